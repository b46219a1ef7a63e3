"""The tokenizer: padding that is not EOS, ids inside the embedding, all tokens that end a turn."""

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import transformers
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from llmtune.errors import LlmtuneError
from llmtune.models.checkpoint import Checkpoint
from llmtune.models.config import TemplateChoice
from llmtune.models.tokenizer import with_arguments
from llmtune.models.turns import find_turn_ending, require_chat_template, stop_token_ids
from tests.tiny import CHATML, VOCAB_SIZE, make_tokenizer

TRANSFORMERS = tuple(int(part) for part in transformers.__version__.split(".")[:2])
LLAMA2_STYLE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
NEXT_TURN_ENDS_IT = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"


@pytest.fixture
def base(checkpoint, tmp_path):
    return Path(shutil.copytree(checkpoint("llama"), tmp_path / "base"))


def load_tokenizer(base: Path, chat_template: Path | None = None) -> PreTrainedTokenizerFast:
    return Checkpoint.open(base, template=TemplateChoice(chat_template)).tokenizer


def save_words(directory: Path, words: list[str], special: list[str], **tokens) -> None:
    """Save a word-level tokenizer of just these words into a checkpoint."""
    vocabulary = {word: id for id, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=words[0]))
    tokenizer.add_special_tokens(special)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens).save_pretrained(directory)
    set_json(directory / "generation_config.json", eos_token_id=1)


def set_json(path: Path, **values) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **values}))


def test_own_pad_token_is_kept(base):
    tokenizer = load_tokenizer(base)

    assert tokenizer.pad_token == "<|pad|>"
    assert tokenizer.eos_token == "<|im_end|>"


@pytest.mark.parametrize(
    ("spare", "expected"),
    [
        (["<|endoftext|>", "<|finetune_right_pad_id|>"], "<|finetune_right_pad_id|>"),
        (["<unk>", "<|reserved_special_token_7|>"], "<|reserved_special_token_7|>"),
        (["<unk>", "<|endoftext|>"], "<|endoftext|>"),
        (["[control_12]", "[PAD]"], "[PAD]"),
        (["<unk>"], "<unk>"),
    ],
)
def test_pad_that_is_eos_gives_way_to_a_spare_token(base, spare, expected):
    words = ["word", "<|im_end|>", *spare]
    save_words(base, words, words[1:], eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer = load_tokenizer(base)

    assert tokenizer.pad_token == expected
    assert tokenizer.eos_token == "<|im_end|>"
    assert len(tokenizer) == len(words)


def test_spare_token_that_ends_an_answer_is_not_taken(base):
    words = ["word", "<|im_end|>", "<|endoftext|>", "<unk>"]
    save_words(base, words, words[1:], eos_token="<|im_end|>")
    set_json(base / "generation_config.json", eos_token_id=[1, 2])

    assert load_tokenizer(base).pad_token == "<unk>"


def test_new_pad_token_takes_a_row_the_embedding_already_has(base):
    save_words(base, ["word", "</s>"], ["</s>"], eos_token="</s>")
    tokenizer = load_tokenizer(base)

    assert tokenizer.pad_token_id == 2 < VOCAB_SIZE


def test_embedding_without_a_spare_row_pads_with_eos(base):
    save_words(base, ["word", "</s>"], ["</s>"], eos_token="</s>")
    set_json(base / "config.json", vocab_size=2)
    tokenizer = load_tokenizer(base)

    assert tokenizer.pad_token == "</s>"
    assert len(tokenizer) == 2


def test_token_without_an_embedding_row_is_refused(base):
    set_json(base / "config.json", vocab_size=100)
    with pytest.raises(LlmtuneError, match="no embedding row \\(100 rows\\)"):
        load_tokenizer(base)


def test_eos_is_taken_from_config_where_the_tokenizer_names_none(base):
    save_words(base, ["word", "</s>", "<unk>"], ["</s>", "<unk>"])
    set_json(base / "config.json", eos_token_id=1)

    assert load_tokenizer(base).eos_token == "</s>"


def test_tokenizer_without_any_eos_is_refused(base):
    save_words(base, ["word", "</s>"], ["</s>"])
    set_json(base / "config.json", eos_token_id=None)
    with pytest.raises(LlmtuneError, match="no EOS token"):
        load_tokenizer(base)


def test_slow_only_tokenizer_is_refused_with_the_remedy(base):
    (base / "tokenizer.json").rename(base / "tokenizer.model")
    with pytest.raises(LlmtuneError, match="save_pretrained"):
        load_tokenizer(base)


def test_given_chat_template_replaces_the_tokenizers_own(base, tmp_path):
    (tmp_path / "mine.jinja").write_text(LLAMA2_STYLE)

    assert load_tokenizer(base, chat_template=tmp_path / "mine.jinja").chat_template == LLAMA2_STYLE
    with pytest.raises(LlmtuneError, match="model.chat_template="):
        load_tokenizer(base, chat_template=tmp_path / "absent.jinja")


@pytest.mark.parametrize("value", [False, 3, 0.5, "a 'b' \"c\" {{ d }}", None])
def test_arguments_become_the_templates_defaults(base, value):
    own = "\n{{ style is none }}|{{ style }}|{{ messages[0].content }}"
    template = with_arguments(own, [("style", value)])
    tokenizer = load_tokenizer(base)
    render = partial(tokenizer.apply_chat_template, [{"content": "Hi"}], tokenize=False)
    assert render(chat_template=template) == render(chat_template=own, style=value)
    assert render(chat_template=template, style="x") == "\nFalse|x|Hi"
    assert with_arguments(template, [("style", value)]) == template


@pytest.mark.parametrize(
    ("name", "message"),
    [("stile", "does not read stile; did you mean style?"), ("tools", "tools is set by what")],
)
def test_an_argument_that_does_nothing_is_refused(name, message):
    with pytest.raises(LlmtuneError, match=message):
        with_arguments("{{ style }}", [(name, True)])


def test_missing_chat_template_is_an_error_only_where_it_is_needed(base):
    make_tokenizer(base, chat_template=None)
    (base / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer = load_tokenizer(base)
    with pytest.raises(LlmtuneError, match="model.chat_template="):
        require_chat_template(tokenizer)

    tokenizer.chat_template = CHATML
    require_chat_template(tokenizer)


def test_end_of_turn_eos_and_generation_config_all_stop():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "<|unk|>"  # a base's end of text, as in Qwen's base models

    assert stop_token_ids(tokenizer) == (1, 3)
    assert stop_token_ids(tokenizer, {"eos_token_id": [7, 1]}) == (1, 3, 7)


def test_template_that_ends_with_eos_adds_nothing():
    tokenizer = make_tokenizer(chat_template=LLAMA2_STYLE)

    assert stop_token_ids(tokenizer) == (tokenizer.eos_token_id,)


def test_turn_that_only_the_next_marker_ends_stops_there():
    tokenizer = make_tokenizer(chat_template=NEXT_TURN_ENDS_IT)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    user = tokenizer.convert_tokens_to_ids("<|user|>")

    assert stop_token_ids(tokenizer) == (tokenizer.eos_token_id, user)


def test_template_that_rejects_the_probe_still_gives_eos():
    tokenizer = make_tokenizer(chat_template="{{ raise_exception('no') }}")

    assert stop_token_ids(tokenizer) == (tokenizer.eos_token_id,)


@pytest.mark.skipif(
    TRANSFORMERS < (5, 23), reason="transformers 5.17 loads torch with its tokenizer class"
)
def test_tokenizer_is_loaded_without_torch(checkpoint):
    program = (
        "import sys; from pathlib import Path\n"
        "from llmtune.models.checkpoint import Checkpoint\n"
        f"base = Path({str(checkpoint('llama'))!r})\n"
        "Checkpoint.open(base).tokenizer; Checkpoint.open(base).fingerprint\n"
        "heavy = {'torch', 'peft', 'trl', 'bitsandbytes', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    "template",
    [
        "{% if add_generation_prompt or messages|length > 1 %}" + CHATML + "{% endif %}",
        "{% for m in messages|reverse %}{{ m.content }}{% endfor %}",
    ],
    ids=["no question alone", "answer first"],
)
def test_a_template_that_prints_a_chat_only_sometimes_is_refused(template):
    with pytest.raises(LlmtuneError, match="does not print the messages' content"):
        find_turn_ending(make_tokenizer(chat_template=template))
