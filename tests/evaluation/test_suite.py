"""A suite file is read whole or refused with file, line and what was expected."""

import json

import pandas
import pytest

from llmtune.errors import LlmtuneError
from llmtune.evaluation.suite import find_suite, load_suite
from llmtune.io.yaml_source import shipped_files

ITEMS = [
    {"id": "a", "question": "2 + 2", "answer": "4", "options": ["3", "4"], "source": "x"},
    {"id": "b", "question": "1 + 2", "answer": "3", "options": ["3", "4"], "source": "y"},
]
FOUR = 'choices: ["3", "4"]'
CHOICE = """\
task: choice
items: items.jsonl
prompt: "What is {{ question }}?"
choices_field: options
"""


def write_suite(folder, text=CHOICE, items=ITEMS):
    (folder / "sums.yaml").write_text(text)
    lines = [item if isinstance(item, str) else json.dumps(item) for item in items]
    (folder / "items.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "sums.yaml"


def message_of(path):
    with pytest.raises(LlmtuneError) as error:
        load_suite(path)
    return str(error.value)


def test_a_choice_suite_is_read_with_rendered_prompts(tmp_path):
    suite = load_suite(write_suite(tmp_path))
    assert (suite.name, suite.task, suite.role) == ("sums", "choice", "target")
    assert [item.prompt for item in suite.items] == ["What is 2 + 2?", "What is 1 + 2?"]
    assert [item.answer for item in suite.items] == [1, 0]
    assert suite.items[0].choices == ("3", "4")


def test_items_may_be_any_file_of_rows(tmp_path):
    path = write_suite(tmp_path)
    expected = load_suite(path)
    rows = [{**item, "options": json.dumps(item["options"])} for item in ITEMS]
    (tmp_path / "items.json").write_text(json.dumps(ITEMS))
    pandas.DataFrame(ITEMS).to_parquet(tmp_path / "items.parquet")
    pandas.DataFrame(rows).to_csv(tmp_path / "items.csv", sep=";", index=False)
    for name in ("items.json", "items.parquet", "items.csv"):
        path.write_text(CHOICE.replace("items.jsonl", name))
        suite = load_suite(path)
        assert suite.items_fingerprint == expected.items_fingerprint, name
    with (tmp_path / "items.csv").open("a") as file:
        file.write("c;3 + 3;7;[3;x\n")
    assert "items.csv:4: field 'options' is text that is not JSON" in message_of(path)
    (tmp_path / "items.csv").write_text("question,answer\n2 + 2,1\n1 + 2,0\n")
    text = CHOICE.replace("items.jsonl", "items.csv").replace("choices_field: options", FOUR)
    path.write_text(text + "answer_is: position\n")
    assert [item.right_answer for item in load_suite(path).items] == ["4", "3"]
    path.write_text(text)
    assert "items.csv:2: the answer '1' is neither one of the choices" in message_of(path)


def test_a_folder_of_texts_has_an_item_for_each_file(tmp_path):
    (tmp_path / "texts" / "deep").mkdir(parents=True)
    for name in ("b.txt", "a.md", "deep/c.txt"):
        (tmp_path / "texts" / name).write_text(f"Once upon a time there was {name}.")
    (tmp_path / "texts" / "more.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    path = tmp_path / "prose.yaml"
    path.write_text("task: perplexity\nitems: texts\ncluster: document\n")
    items = load_suite(path).items
    assert [(item.id, item.cluster) for item in items] == [
        ("a.md", "a.md"),
        ("b.txt", "b.txt"),
        ("deep/c.txt", "deep/c.txt"),
        ("more.jsonl:1", "more.jsonl"),
        ("more.jsonl:2", "more.jsonl"),
    ]
    assert items[2].text == "Once upon a time there was deep/c.txt."
    (tmp_path / "texts" / "more.jsonl").write_text('{"text": "one"}\n{"words": "two"}\n')
    assert "texts/more.jsonl:2: field 'text' is missing" in message_of(path)


def test_an_answer_may_be_an_index(tmp_path):
    items = [{**ITEMS[0], "answer": 0}]
    assert load_suite(write_suite(tmp_path, items=items)).items[0].answer == 0


STARS = """\
task: choice
items: items.jsonl
prompt: "{{ q }}"
"""


def answers_of(folder, declared, items):
    suite = load_suite(write_suite(folder, STARS + declared, items))
    return [item.right_answer for item in suite.items]


@pytest.mark.parametrize("choices", ["[1, 2, 3, 4, 5]", '["1", "2", "3", "4", "5"]'])
def test_a_whole_number_that_is_a_choice_means_that_choice(tmp_path, choices):
    items = [{"q": "review", "answer": number} for number in (1, 2, 4)]
    assert answers_of(tmp_path, f"choices: {choices}\n", items) == ["1", "2", "4"]


def test_a_whole_number_that_is_no_choice_makes_all_of_them_positions(tmp_path):
    items = [{"q": "review", "answer": number} for number in (0, 1, 2)]
    assert answers_of(tmp_path, "choices: [1, 2, 3]\n", items) == ["1", "2", "3"]


def test_numbers_that_fit_no_one_reading_are_refused_by_line(tmp_path):
    items = [{"q": "review", "answer": number} for number in (0, 5)]
    path = write_suite(tmp_path, STARS + "choices: [1, 2, 5]\n", items)
    assert "items.jsonl: line 2: the answer 5 is not a position" in message_of(path)


def test_numbers_that_fit_both_readings_of_an_items_own_choices_are_not_guessed(tmp_path):
    items = [{"q": "sum", "options": ["2", "1", "0"], "answer": 1}] * 2
    items.append({"q": "sum", "options": ["2", "1", "0"], "answer": 2})
    declared = "choices_field: options\n"
    message = message_of(write_suite(tmp_path, STARS + declared, items))
    assert "line 3: the answer 2 is the text of one of the choices" in message
    assert answers_of(tmp_path, declared + "answer_is: text\n", items) == ["1", "1", "2"]
    assert answers_of(tmp_path, declared + "answer_is: position\n", items) == ["1", "1", "0"]


def test_a_mark_of_byte_order_is_not_text(tmp_path):
    path = write_suite(tmp_path)
    for file in (path, tmp_path / "items.jsonl"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert len(load_suite(path).items) == 2


def test_nan_is_a_text_if_it_is_quoted(tmp_path):
    text = 'task: exact\nitems: items.jsonl\nprompt: "{{ question }}"\n'
    items = [{"question": "which?", "answer": answer} for answer in ("nan", "NA", "None", "null")]
    suite = load_suite(write_suite(tmp_path, text, items))
    assert [item.references for item in suite.items] == [("nan",), ("NA",), ("None",), ("null",)]
    path = write_suite(tmp_path, text, ['{"question": "which?", "answer": NaN}'])
    assert "items.jsonl:1: not JSON (NaN is not a JSON value; quote it" in message_of(path)


def test_number_match_needs_a_number_that_can_be_read(tmp_path):
    text = STARS.replace("choice", "exact") + "metric: number_match\n"
    path = write_suite(tmp_path, text, [{"q": "how many?", "answer": "1,2"}])
    assert "items.jsonl:1: the answer '1,2' holds no number" in message_of(path)


def test_an_exact_suite_accepts_several_references(tmp_path):
    text = 'task: exact\nitems: items.jsonl\nprompt: "{{ question }}"\n'
    items = [{"question": "2 + 2", "answer": ["4", "four"]}, {"question": "1", "answer": 1}]
    suite = load_suite(write_suite(tmp_path, text, items))
    assert [item.references for item in suite.items] == [("4", "four"), ("1",)]
    assert [item.id for item in suite.items] == ["1", "2"]


def test_a_perplexity_suite_is_read_with_clusters_and_slices(tmp_path):
    text = "task: perplexity\nitems: items.jsonl\ntext: body\ncluster: doc\nslices: [kind]\n"
    items = [{"body": "Some prose.", "doc": 7, "kind": "news"}]
    [item] = load_suite(write_suite(tmp_path, text, items)).items
    assert (item.text, item.cluster, item.slices) == ("Some prose.", "7", (("kind", "news"),))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("choises: [a, b]", "sums.yaml:5: choises: unknown key; did you mean choices"),
        ("limit: many", "sums.yaml:5: limit: .*integer.*'many'"),
        ("role: other", "sums.yaml:5: role: .*'target', 'transfer' or 'general'"),
        ("choices: [a, b]", "either choices"),
        ("system: hi\nchat: false", "system needs chat: true"),
        ("end_of_answer: true\nchat: false", "end_of_answer needs chat"),
        ("max_length: 5", "max_length: unknown key"),
    ],
)
def test_a_wrong_key_is_named_with_its_line(tmp_path, line, expected):
    path = write_suite(tmp_path, CHOICE + line + "\n")
    with pytest.raises(LlmtuneError, match=expected):
        load_suite(path)


def test_all_wrong_keys_are_told_at_once(tmp_path):
    message = message_of(write_suite(tmp_path, CHOICE + "limit: 0\nrolle: target\n"))
    assert "limit" in message and "rolle: unknown key; did you mean role?" in message


def test_an_unknown_task_lists_the_tasks(tmp_path):
    text = CHOICE.replace("task: choice", "task: ranking")
    message = message_of(write_suite(tmp_path, text))
    assert "choice, reply, exact, perplexity, not 'ranking'" in message


def test_yes_and_no_are_words(tmp_path):
    text = CHOICE.replace("choices_field: options", "choices: [yes, no]")
    items = [{"question": "Is it?", "answer": "no"}]
    [item] = load_suite(write_suite(tmp_path, text, items)).items
    assert (item.choices, item.answer) == (("yes", "no"), 1)


@pytest.mark.parametrize("task", ["[a]", "{a: b}", "null", "1"])
def test_a_task_that_is_no_word_is_an_error_with_its_line(tmp_path, task):
    text = CHOICE.replace("task: choice", f"task: {task}")
    assert "sums.yaml:1: task must be one of" in message_of(write_suite(tmp_path, text))


def test_a_suite_that_is_not_utf8_is_an_error(tmp_path):
    path = write_suite(tmp_path)
    path.write_bytes(CHOICE.encode() + "description: caf\xe9\n".encode("latin-1"))
    assert "sums.yaml: is not a text file in UTF-8" in message_of(path)


def test_an_item_that_is_not_utf8_is_named_with_its_line(tmp_path):
    path = write_suite(tmp_path)
    with (tmp_path / "items.jsonl").open("ab") as file:
        file.write(b'{"question": "caf\xe9"}\n')
    assert "items.jsonl:3: not UTF-8" in message_of(path)


@pytest.mark.parametrize(
    "expression",
    [
        "question + 1",
        "1 / 0",
        "options[9].x",
        "range(10 ** 9)",
        "'%d' % question",
        "question()",
        "'a' * 10 ** 9",
    ],
)
def test_a_prompt_that_fails_on_an_item_is_named_with_its_line(tmp_path, expression):
    path = write_suite(tmp_path, CHOICE.replace("question", expression, 1))
    assert "items.jsonl:1: the prompt cannot be rendered: " in message_of(path)


@pytest.mark.parametrize("name", ["../../evil", "a/b", ".hidden", "-x", "'two words'", "''"])
def test_a_name_that_would_lead_out_of_the_run_is_refused(tmp_path, name):
    message = message_of(write_suite(tmp_path, CHOICE + f"name: {name}\n"))
    assert "sums.yaml:5: name: " in message and "cannot name" in message


def test_a_file_whose_stem_cannot_name_results_needs_a_name(tmp_path):
    path = write_suite(tmp_path).rename(tmp_path / "my sums.yaml")
    assert "my sums.yaml: 'my sums' cannot name" in message_of(path)
    path.write_text(CHOICE + "name: sums-2.1\n")
    assert load_suite(path).name == "sums-2.1"


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ({**ITEMS[1], "answer": "5"}, "neither one of the choices"),
        ({**ITEMS[1], "answer": 2}, "neither one of the choices"),
        ({**ITEMS[1], "answer": True}, "neither one of the choices"),
        ({**ITEMS[1], "options": ["3", "3"]}, "two different texts"),
        ({**ITEMS[1], "options": "34"}, "list of texts"),
        (
            {"id": "b", "answer": "3", "options": ["3", "4"]},
            "asks for 'question', which is not there; there is answer, id, options",
        ),
        ({**ITEMS[1], "question": None}, "prints 'question', which is null"),
        ({"id": "b", "question": "x", "options": ["3", "4"]}, "field 'answer' is missing"),
        ({**ITEMS[1], "id": "a"}, "id 'a' is not unique"),
        ("{not json}", "Expecting"),
        ("[1, 2]", "expected an object"),
        (
            '{"id": "b", "question": "x", "options": ["3", "4"], "answer": "3", "answer": "4"}',
            "the key 'answer' is there twice in one object",
        ),
    ],
)
def test_a_wrong_item_is_named_with_its_line(tmp_path, item, expected):
    message = message_of(write_suite(tmp_path, items=[ITEMS[0], item]))
    assert "items.jsonl:2: " in message and expected in message


def test_many_wrong_items_are_counted(tmp_path):
    message = message_of(write_suite(tmp_path, items=["{}"] * 25))
    assert message.count("items.jsonl:") == 10 and "and 15 more" in message


def test_a_missing_or_empty_items_file_is_an_error(tmp_path):
    path = write_suite(tmp_path, items=[""])
    assert "no items" in message_of(path)
    (tmp_path / "items.jsonl").unlink()
    assert "not there" in message_of(path)


def test_a_prompt_with_bad_jinja_is_an_error(tmp_path):
    assert "prompt" in message_of(write_suite(tmp_path, CHOICE.replace("}}", "")))


def test_a_prompt_cannot_run_python(tmp_path):
    text = CHOICE.replace("{{ question }}", "{{ question.__class__.__mro__ }}")
    assert "cannot be rendered" in message_of(write_suite(tmp_path, text))


def test_limits_are_nested_and_keep_file_order(tmp_path):
    items = [{**ITEMS[0], "id": f"i{n}"} for n in range(50)]
    path = write_suite(tmp_path, CHOICE + "limit: 40\n", items)
    ids = {n: [i.id for i in load_suite(path, limit=n).items] for n in (10, 20, 45)}
    assert [len(ids[n]) for n in (10, 20, 45)] == [10, 20, 40]
    assert set(ids[10]) < set(ids[20]) < set(ids[45])
    assert ids[20] == sorted(ids[20], key=lambda name: int(name[1:]))
    assert [i.id for i in load_suite(path, limit=10, seed=1).items] != ids[10]


def test_the_fingerprint_follows_what_is_asked(tmp_path):
    path = write_suite(tmp_path)
    before = load_suite(path).items_fingerprint
    write_suite(tmp_path, items=[ITEMS[0], {**ITEMS[1], "unused": 1}])
    assert load_suite(path).items_fingerprint == before
    write_suite(tmp_path, items=[ITEMS[0], {**ITEMS[1], "question": "3 + 0"}])
    assert load_suite(path).items_fingerprint != before


def test_shipped_suites_are_found_by_name():
    assert find_suite("general") == shipped_files("evals")["general"]
    with pytest.raises(LlmtuneError, match="Did you mean 'general'"):
        find_suite("genral")


def test_a_selection_keeps_the_fingerprint_of_the_whole_suite(tmp_path):
    suite = load_suite(write_suite(tmp_path))
    half = suite.select({"b"})
    assert [item.id for item in half.items] == ["b"]
    assert (half.num_whole, suite.num_whole) == (2, 2)
    assert half.items_fingerprint == suite.items_fingerprint
    assert suite.select({"a", "b", "c"}) is suite
    assert half.select({"b"}).num_whole == 2
