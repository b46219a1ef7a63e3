"""A base's generation config made valid and complete before training, not at the last save."""

import tempfile
import warnings

from transformers import GenerationConfig, PreTrainedModel

from llmtune.errors import LlmtuneError

# Knobs that only sampling reads. Beside `do_sample: false` they make `save_pretrained` raise.
SAMPLING_KNOBS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "top_h",
)


def repair_generation_config(
    model: PreTrainedModel, stop_ids: tuple[int, ...], pad_id: int
) -> tuple[str, ...]:
    """Give `model.generation_config` all stop tokens and the pad token, and make it savable.

    Sampling knobs beside `do_sample: false` are dropped: greedy decoding never read them. Returns
    one line for each such change.

    Raises:
        LlmtuneError: the config cannot be saved even so; found now and not after hours of training.
    """
    config = model.generation_config
    notices = _drop_unread_sampling(config)
    config.eos_token_id = list(stop_ids) if len(stop_ids) > 1 else stop_ids[0]
    config.pad_token_id = pad_id
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config.save_pretrained(directory)
        except ValueError as error:
            raise LlmtuneError(
                f"{model.name_or_path}/generation_config.json: transformers will not save it: "
                f"{error}. Correct that file."
            ) from error
    return notices


def _drop_unread_sampling(config: GenerationConfig) -> tuple[str, ...]:
    if config.do_sample:
        return ()
    neutral = GenerationConfig()
    dropped = [
        name
        for name in SAMPLING_KNOBS
        if getattr(config, name, None) not in (None, getattr(neutral, name, None))
    ]
    for name in dropped:
        setattr(config, name, getattr(neutral, name, None))
    if not dropped:
        return ()
    names = ", ".join(dropped)
    return (f"generation config: {names} dropped, because do_sample is false there",)
