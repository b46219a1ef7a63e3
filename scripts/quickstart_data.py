"""Human sentiment ratings of sentences -> the quickstart's JSONL files, split without overlap."""

import hashlib
import html
import io
import json
import re
import tarfile
import unicodedata
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from llmtune.errors import LlmtuneError

# Of 21 wordings tried zero-shot on held-out movies, the one the untuned model does best with.
PROMPT = "Sentence: {text}\nSentiment:"
LABELS = ("positive", "negative")
LABEL_THRESHOLD = 1.0  # mean human rating on a scale of -4 .. 4; what is between is left out
INNER_ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
RATINGS_MEMBERS = {
    "movies": "movieReviewSnippets_GroundTruth.txt",
    "products": "amazonReviewSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
    "editorials": "nytEditorialSnippets_GroundTruth.txt",
}
DOMAINS_WITH_DOCUMENTS = ("products", "editorials")  # their ids read document_sentence
MAX_MEMBER_BYTES = 16 * 2**20

# Buckets are hundredths of the SHA-256 of the normalized sentence.
MOVIES_TEST_BUCKETS = range(0, 10)
MOVIES_VALIDATION_BUCKETS = range(10, 11)

NUM_PASSAGES = 100
MIN_PASSAGE_WORDS = 150
MAX_PASSAGE_WORDS = 300


@dataclass(frozen=True)
class RatedSentence:
    """One sentence with its mean human rating; `document` is None where the source has none."""

    id: str
    text: str
    rating: float
    document: str | None

    @property
    def label(self) -> str | None:
        """`positive` from +1 up, `negative` from -1 down, None in between."""
        if self.rating >= LABEL_THRESHOLD:
            return "positive"
        if self.rating <= -LABEL_THRESHOLD:
            return "negative"
        return None


def prepare_quickstart(sdist_file: Path, output_dir: Path) -> dict[str, list[dict]]:
    """Write every quickstart file under `output_dir` and return file name -> rows.

    The same archive always gives byte-identical files. Raises LlmtuneError for an archive that
    does not hold the expected members, or members that do not parse.
    """
    domains = read_ratings(sdist_file)
    files = build_files(domains)
    output_dir.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        _write_jsonl(output_dir / name, rows)
    return files


def read_ratings(sdist_file: Path) -> dict[str, list[RatedSentence]]:
    """Read the four domains from the archive inside the source distribution, all in memory."""
    with zipfile.ZipFile(sdist_file) as outer:
        names = [name for name in outer.namelist() if name.endswith(f"/{INNER_ARCHIVE}")]
        if len(names) != 1:
            raise LlmtuneError(
                f"{sdist_file} holds {len(names)} files ending in {INNER_ARCHIVE}, expected one; "
                "delete it and run this script again"
            )
        inner_bytes = outer.read(names[0])
    wanted = {member: domain for domain, member in RATINGS_MEMBERS.items()}
    texts: dict[str, str] = {}
    with tarfile.open(fileobj=io.BytesIO(inner_bytes), mode="r:gz") as inner:
        for member in inner:
            domain = wanted.get(member.name.rpartition("/")[2])
            if domain is not None and member.isfile() and member.size <= MAX_MEMBER_BYTES:
                texts[domain] = inner.extractfile(member).read().decode("utf-8")
    missing = [member for domain, member in RATINGS_MEMBERS.items() if domain not in texts]
    if missing:
        raise LlmtuneError(f"{sdist_file}: {INNER_ARCHIVE} lacks {', '.join(missing)}")
    return {domain: parse_ratings(texts[domain], domain) for domain in RATINGS_MEMBERS}


def parse_ratings(text: str, domain: str) -> list[RatedSentence]:
    """Parse `id TAB mean rating TAB sentence` lines; a line of another shape is an error."""
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        fields = line.split("\t")
        try:
            identity, rating, sentence = fields[0], float(fields[1]), fields[2]
        except (IndexError, ValueError) as error:
            raise LlmtuneError(
                f"{RATINGS_MEMBERS[domain]}:{number}: expected id, rating and sentence apart by "
                f"tabs, found {line[:80]!r}"
            ) from error
        document = None
        if domain in DOMAINS_WITH_DOCUMENTS:
            document = f"{domain}-{identity.partition('_')[0]}"
        rows.append(RatedSentence(f"{domain}-{identity}", clean_text(sentence), rating, document))
    return rows


def clean_text(text: str) -> str:
    """Undo HTML entities, turn doubled apostrophes into quotes, collapse white space."""
    text = html.unescape(text).replace("''", '"')
    return re.sub(r"\s+", " ", text).strip()


def normalize_text(text: str) -> str:
    """What makes two sentences the same one: letters and digits, without case or accents."""
    decomposed = unicodedata.normalize("NFKD", text).casefold()
    words = re.findall(r"[^\W_]+", "".join(c for c in decomposed if not unicodedata.combining(c)))
    return " ".join(words) or re.sub(r"\s+", "", text)


def build_files(domains: dict[str, list[RatedSentence]]) -> dict[str, list[dict]]:
    """Label, split and render: file name -> rows. Nothing tested is ever trained on.

    Movies are split by the hash of the normalized sentence. A movie sentence that also appears
    in any other domain (labelled or not) is kept out of the training rows.
    """
    labelled = {domain: _labelled_once(rows) for domain, rows in domains.items()}
    elsewhere = {
        normalize_text(row.text)
        for domain, rows in domains.items()
        if domain != "movies"
        for row in rows
    }
    train, validation, test = [], [], []
    for row in labelled["movies"]:
        bucket = _hash_bucket(row.text)
        if bucket in MOVIES_TEST_BUCKETS:
            test.append(row)
        elif normalize_text(row.text) in elsewhere:
            continue
        elif bucket in MOVIES_VALIDATION_BUCKETS:
            validation.append(row)
        else:
            train.append(row)
    return {
        "movies_train.jsonl": [_train_row(row) for row in train],
        "movies_validation.jsonl": [_train_row(row) for row in validation],
        "movies_test.jsonl": [_test_row(row) for row in test],
        "products_test.jsonl": [_test_row(row) for row in labelled["products"]],
        "tweets_test.jsonl": [_test_row(row) for row in labelled["tweets"]],
        "editorials_test.jsonl": [_test_row(row) for row in labelled["editorials"]],
        "editorial_passages.jsonl": build_passages(domains["editorials"]),
    }


def build_passages(sentences: Iterable[RatedSentence]) -> list[dict]:
    """Join each document's sentences in order into one passage; keep the first 100 by hash.

    A passage starts a document and stops before the sentence that would pass 300 words; a
    document too short for 150 words gives none.
    """
    documents: dict[str, list[str]] = {}
    for row in sentences:
        assert row.document is not None
        documents.setdefault(row.document, []).append(row.text)
    passages = []
    for document, texts in documents.items():
        words = 0
        kept = []
        for text in texts:
            if words + len(text.split()) > MAX_PASSAGE_WORDS:
                break
            kept.append(text)
            words += len(text.split())
        if words >= MIN_PASSAGE_WORDS:
            passages.append({"id": document, "text": " ".join(kept), "document": document})
    passages.sort(key=lambda passage: _hash_hex(passage["text"]))
    return passages[:NUM_PASSAGES]


def _labelled_once(rows: list[RatedSentence]) -> list[RatedSentence]:
    """The labelled sentences, duplicates once, none whose copies disagree; in order of hash.

    The order of the hash mixes the labels: the movie ratings are sorted by label in the source.
    """
    first: dict[str, RatedSentence] = {}
    labels: dict[str, set[str]] = {}
    for row in rows:
        if row.label is not None:
            key = normalize_text(row.text)
            first.setdefault(key, row)
            labels.setdefault(key, set()).add(row.label)
    agreed = [row for key, row in first.items() if len(labels[key]) == 1]
    return sorted(agreed, key=lambda row: _hash_hex(row.text))


def _hash_hex(text: str) -> str:
    return hashlib.sha256(normalize_text(text).encode("utf-8")).hexdigest()


def _hash_bucket(text: str) -> int:
    return int(_hash_hex(text)[:8], 16) % 100


def _train_row(row: RatedSentence) -> dict:
    return {
        "id": row.id,
        "messages": [
            {"role": "user", "content": PROMPT.format(text=row.text)},
            {"role": "assistant", "content": row.label},
        ],
    }


def _test_row(row: RatedSentence) -> dict:
    fields = {
        "id": row.id,
        "prompt": PROMPT.format(text=row.text),
        "answer": row.label,
        "rating": row.rating,
    }
    if row.document is not None:
        fields["document"] = row.document
    return fields


def _write_jsonl(path: Path, rows: list[dict]) -> None:
    """Write atomically: a reader sees the whole file or none of it."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8", newline="\n") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
    partial.replace(path)
