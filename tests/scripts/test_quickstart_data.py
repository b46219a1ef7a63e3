"""The quickstart's data: cleaned, labelled by rating, and nothing tested is ever trained on."""

import io
import json
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from llmtune.errors import LlmtuneError

SCRIPTS_DIR = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS_DIR))

import quickstart_data as data  # noqa: E402


def make_sdist(path: Path, ratings: dict[str, str]) -> Path:
    """A source distribution with the ratings' archive inside; `ratings`: domain -> file text."""
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as tar:
        for domain, text in ratings.items():
            member = tarfile.TarInfo(f"hutto/{data.RATINGS_MEMBERS[domain]}")
            content = text.encode("utf-8")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    with zipfile.ZipFile(path, "w") as outer:
        outer.writestr(f"package-0.5/{data.INNER_ARCHIVE}", inner.getvalue())
    return path


def movie_lines(count: int) -> list[str]:
    return [
        f"{n}\t{2.5 if n % 2 else -2.5}\tFilm number {n} is one of a kind." for n in range(count)
    ]


def small_ratings() -> dict[str, str]:
    words = " ".join(["word"] * 19)
    return {
        "movies": "\r\n".join(movie_lines(400)) + "\r\n",
        "products": "1_1\t1.5\tit works.\r\n1_2\t-1.2\tit broke.\r\n2_1\t0.3\ta box.\r\n",
        "tweets": "1\t2.0\tLove it &amp; you &lt;3\r\n2\t-1\tIt rains again\r\n",
        "editorials": "".join(f"1_{n}\t-1.5\tSentence{n} {words}.\r\n" for n in range(1, 21)),
    }


def sentences(rows: list[dict]) -> set[str]:
    """The normalized sentences inside the rows' prompts."""
    prompts = [r["messages"][0]["content"] if "messages" in r else r["prompt"] for r in rows]
    before, after = data.PROMPT.split("{text}")
    return {data.normalize_text(p.removeprefix(before).removesuffix(after)) for p in prompts}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, list[dict]]:
    sdist = make_sdist(tmp_path / "sdist.zip", small_ratings())
    return data.prepare_quickstart(sdist, tmp_path / "out")


def test_cleaning_undoes_entities_doubled_apostrophes_and_gaps():
    assert data.clean_text(" a &lt;3 &amp; ''b''   c\r") == 'a <3 & "b" c'


def test_normalized_text_ignores_case_accents_and_punctuation_but_keeps_bare_symbols():
    assert data.normalize_text("Très  Bien, it's!") == data.normalize_text("tres bien it's")
    assert data.normalize_text(":) :)") == ":):)"


@pytest.mark.parametrize(
    ("rating", "label"),
    [(1.0, "positive"), (0.99, None), (0.0, None), (-0.99, None), (-1.0, "negative")],
)
def test_label_needs_a_rating_of_one_or_more_either_way(rating, label):
    assert data.RatedSentence("x", "text", rating, None).label == label


def test_training_validation_and_test_rows_share_no_sentence(files):
    train = sentences(files["movies_train.jsonl"])
    validation = sentences(files["movies_validation.jsonl"])
    assert train and validation and not train & validation
    for name in ("movies", "products", "tweets", "editorials"):
        tested = sentences(files[f"{name}_test.jsonl"])
        assert tested and not tested & (train | validation)


def test_a_movie_sentence_found_in_another_domain_is_not_trained_on(files):
    shared = sorted(sentences(files["movies_train.jsonl"]))[0]
    ratings = small_ratings()
    ratings["tweets"] += f"3\t0.1\t{shared.upper()}!\r\n"
    domains = {name: data.parse_ratings(text, name) for name, text in ratings.items()}
    without = sentences(data.build_files(domains)["movies_train.jsonl"])
    assert sentences(files["movies_train.jsonl"]) - without == {shared}


def test_copies_of_a_sentence_count_once_and_disagreeing_copies_not_at_all():
    rows = [
        data.RatedSentence("1", "Good fun.", 2.0, None),
        data.RatedSentence("2", "good FUN", 1.0, None),
        data.RatedSentence("3", "Odd.", 2.0, None),
        data.RatedSentence("4", "odd", -2.0, None),
    ]
    domains = {"movies": [], "products": [], "tweets": rows, "editorials": []}
    tested = data.build_files(domains)["tweets_test.jsonl"]
    assert [row["id"] for row in tested] == ["1"]


def test_rows_carry_the_fields_the_suites_and_the_trainer_read(files):
    row = files["movies_train.jsonl"][0]
    assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
    assert row["messages"][1]["content"] in data.LABELS
    assert files["products_test.jsonl"][0].keys() == {
        "id",
        "prompt",
        "answer",
        "rating",
        "document",
    }
    assert {row["document"] for row in files["products_test.jsonl"]} == {"products-1"}
    assert "document" not in files["tweets_test.jsonl"][0]


def test_training_and_test_prompts_are_worded_alike(files):
    prompts = [row["messages"][0]["content"] for row in files["movies_train.jsonl"]]
    prompts += [row["prompt"] for row in files["editorials_test.jsonl"]]
    before, after = data.PROMPT.split("{text}")
    assert all(prompt.startswith(before) and prompt.endswith(after) for prompt in prompts)


def test_passages_join_a_documents_sentences_in_order_up_to_300_words(files):
    (passage,) = files["editorial_passages.jsonl"]
    assert passage["document"] == "editorials-1"
    assert passage["text"].startswith("Sentence1 word") and "Sentence15 " in passage["text"]
    assert len(passage["text"].split()) == 300


def test_a_document_too_short_gives_no_passage():
    assert data.build_passages([data.RatedSentence("1_1", "Too short.", 0.0, "d")]) == []


def test_two_runs_write_identical_bytes(tmp_path):
    sdist = make_sdist(tmp_path / "sdist.zip", small_ratings())
    written = []
    for name in ("first", "second"):
        data.prepare_quickstart(sdist, tmp_path / name)
        written.append({p.name: p.read_bytes() for p in sorted((tmp_path / name).iterdir())})
    assert written[0] == written[1]
    assert len(written[0]) == 7
    for content in written[0].values():
        assert [json.loads(line) for line in content.decode("utf-8").splitlines()]


def test_a_line_of_another_shape_is_named():
    with pytest.raises(LlmtuneError, match=r"tweets_GroundTruth.txt:2: expected id, rating"):
        data.parse_ratings("1\t2.0\tfine\n2\tmuch\tnot a number\n", "tweets")


def test_a_missing_domain_is_named(tmp_path):
    ratings = small_ratings()
    del ratings["tweets"]
    with pytest.raises(LlmtuneError, match=r"lacks tweets_GroundTruth.txt"):
        data.read_ratings(make_sdist(tmp_path / "sdist.zip", ratings))
