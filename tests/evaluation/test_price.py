"""What a quantization costs is measured before training, kept, and said."""

import dataclasses
import logging

from llmtune import load_config, train
from llmtune.evaluation.price import QuantizationPrice, measure_price
from llmtune.io.manifest import read_manifest
from llmtune.models.resolve import resolve_base
from llmtune.reporting.verdict.caveats import find_training_caveats
from tests.project import make_project

SIZES = {"none": 270_000_000, "nf4": 110_000_000}


def test_training_on_a_quantized_base_says_its_price_and_keeps_it(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("LLMTUNE_CACHE", str(tmp_path / "cache"))
    config = load_config(
        make_project(tmp_path), ["model.quantization={method: nf4}", "train.max_steps=1"]
    )
    with caplog.at_level(logging.INFO, logger="llmtune"):
        train(config)
    assert "nf4 costs" in caplog.text
    price = read_manifest(config.run).stages["train"]["result"]["quantization_price"]
    assert price["price"] == price["quantized"] - price["original"]
    sizes = price["base_bytes"]
    assert sizes["nf4"] < sizes["int8"] < sizes["none"]
    assert len(list((tmp_path / "cache" / "prices").glob("*.json"))) == 1
    again = measure_price(config.model, resolve_base(config.model))
    assert again is not None
    assert dataclasses.asdict(again) == price
    monkeypatch.setattr("llmtune.evaluation.price.versions", lambda: {"torch": "0"})
    assert measure_price(config.model, resolve_base(config.model)) is not None
    assert len(list((tmp_path / "cache" / "prices").glob("*.json"))) == 2  # measured again


def test_an_unquantized_base_has_no_price(tmp_path):
    config = load_config(make_project(tmp_path))
    assert measure_price(config.model, resolve_base(config.model)) is None


def test_a_price_over_half_the_bound_is_a_warning_and_a_caveat():
    high = QuantizationPrice("nf4", 3.733, 3.966, 0.233, SIZES)
    assert "model.quantization=null" in high.lines(0.2)[0]
    assert "model.quantization" not in high.lines(1.0)[0]
    (caveat,) = find_training_caveats({"quantization_price": dataclasses.asdict(high)})
    assert "+0.233" in caveat
    low = dataclasses.replace(high, quantized=3.75, price=0.017)
    assert find_training_caveats({"quantization_price": dataclasses.asdict(low)}) == ()
