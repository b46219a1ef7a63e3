"""Open questions, and beginnings of prose, for a model to continue: not for scores."""

OPEN_PROMPTS = (
    "What is the capital of Italy, and what is it known for?",
    "Write two sentences about a rainy morning in a small town.",
    "Explain to a child why the sky is blue.",
    "Give me three tips for learning a new language.",
    "How do I boil an egg so that the yolk stays soft?",
    "Name four animals that live in the sea.",
    "What is the difference between a lake and a river?",
    "Write a short poem about an old bicycle.",
    "Why do people keep bees?",
    "List the steps to plant a tree.",
    "What does a carpenter do all day?",
    "Describe the taste of a lemon.",
    "How many days are there in a leap year, and why?",
    "Suggest a name for a bakery next to a station.",
    "What should I pack for two days in the mountains?",
    "Write a polite message that declines an invitation to dinner.",
    "What is bread made of?",
    "Tell me a fact about the moon.",
    "How can I fall asleep more easily?",
    "Summarize in one sentence why sport is good for people.",
)

OPENERS = (
    "The history of the town begins with",
    "When water freezes, it",
    "She opened the letter and",
    "In recent years, many people have",
    "The committee decided on Tuesday that",
    "To make this soup, start by",
    "The largest river of the country",
    "According to the report, the economy",
    "He had never believed that",
    "Plants need light because",
    "The new law will change",
    "There are two reasons why",
    "After the war, the family moved to",
    "A good teacher knows that",
    "The museum holds a collection of",
    "Scientists at the university found that",
    "The price of bread",
    "It was late in the evening when",
    "Most computers store numbers as",
    "The critics of this idea say that",
)

GENERAL_PASSAGES = (
    "The market opens before sunrise. Farmers from the surrounding villages unload crates of "
    "apples, onions and cabbages, while the baker on the corner lifts the first loaves out of the "
    "oven. By eight o'clock the square is full of people who compare prices, taste the cheese and "
    "exchange the news of the week.",
    "When water is heated, its molecules move faster and the bonds between them begin to break. At "
    "the boiling point the liquid turns into vapor. High in the mountains the air pressure is "
    "lower, so water boils at a lower temperature, and potatoes take longer to cook than they do "
    "at the coast.",
    "Her grandfather kept a small workshop behind the house where he repaired clocks. He used to "
    "say that a clock never stops without a reason, and that patience finds it sooner than force. "
    "After he died, she opened the drawers one by one and found that every screw had been sorted "
    "and labeled in his careful handwriting.",
    "The city council voted on Tuesday to replace the old bridge over the river. Engineers had "
    "warned for years that its pillars were no longer safe for heavy trucks. Construction will "
    "begin in spring and is expected to take eighteen months; until then traffic will be limited "
    "to a single lane in each direction.",
    "A good map leaves things out. It shows the roads a traveler needs and ignores the trees, the "
    "fences and the color of the houses. The skill of the map maker lies in choosing what matters "
    "for the journey, because a map that showed everything would be as large and as confusing as "
    "the country itself.",
    "Bread needs only flour, water, salt and time. The dough is mixed in the evening and left to "
    "rest overnight, so that the yeast can do its slow work. In the morning it is shaped, scored "
    "with a sharp knife and baked in a very hot oven until the crust is dark and sounds hollow "
    "when it is tapped.",
    "The library moved into the former railway station ten years ago. The waiting room became a "
    "reading room with tall windows, and children now borrow picture books at the counter where "
    "tickets were once sold. Trains still pass behind the building, and the readers have learned "
    "not to look up when the glass begins to tremble.",
    "Birds that spend the summer in the north face a choice when the days grow short. Some stay "
    "and live on seeds and berries; others fly thousands of miles to warmer places. They find "
    "their way by the sun, the stars and the magnetic field of the earth, and many return to the "
    "very tree in which they were hatched.",
)
"""Plain prose, the same in every run: what a change of the weights costs is measured on it."""
