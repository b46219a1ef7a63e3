"""Open questions that any instruction model can answer: for comparisons, not for scores."""

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
