"""Checks of the metadata fields."""

from __future__ import annotations

import json
import re

import pytest
from pydantic import ValidationError

from steer_engine.errors import VectorFileError
from steer_engine.site import Site
from steer_engine.vectors import VectorMetadata
from steer_engine.vectors.metadata import FittedCondition, FittedProbe, metadata_from_text, metadata_to_text


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"unknown": 1}, "unknown"),
        ({"model": 3}, "model"),
        ({"model": "m" * 1025}, "model"),
        ({"notes": "n" * 16385}, "notes"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": "8"}, "hidden_size"),
        ({"num_blocks": 1025}, "num_blocks"),
        ({"residual_norms": {-1: 1.0}}, "residual_norms"),
        ({"residual_norms": {1024: 1.0}}, "residual_norms"),
        ({"residual_norms": {1: 0.0}}, "residual_norms"),
        ({"residual_norms": {1: float("nan")}}, "residual_norms"),
        ({"residual_norms": {1: float("inf")}}, "residual_norms"),
        ({"residual_norms": {1: "2"}}, "residual_norms"),
        ({"separation": {1: 1.5}}, "separation"),
        ({"explained_variance": {1: -0.1}}, "explained_variance"),
        ({"separation": {1: float("nan")}}, "separation"),
        ({"dataset_digest": "sha256:00"}, "dataset_digest"),
        ({"dataset_digest": "sha256:" + "a" * 64 + "\n"}, "dataset_digest"),
        ({"created_with": {str(i): "" for i in range(65)}}, "created_with"),
        ({"extra": {"": "x"}}, "extra"),
        ({"extra": {"k": "\ud800"}}, "extra"),
    ],
)
def test_errors_name_the_unusable_field(fields: dict[str, object], where: str) -> None:
    with pytest.raises(VectorFileError, match=f"metadata field '{where}"):
        VectorMetadata.checked(fields)


def test_it_is_frozen_and_residual_norms_are_sorted() -> None:
    metadata = VectorMetadata(residual_norms={5: 1.0, 2: 3.0})
    assert list(metadata.residual_norms) == [2, 5]
    with pytest.raises(ValidationError):
        metadata.model = "other"  # type: ignore[misc]


CONDITION = {"blocks": [3, 5], "measure": "cosine", "at": "mean_prompt", "above": 0.25}


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("{}", "condition.blocks"),
        ('{"blocks": []}', "condition.blocks"),
        ('{"blocks": [true]}', "condition.blocks.0"),
        ('{"blocks": [1024]}', "condition.blocks.0"),
        ('{"blocks": "14"}', "condition.blocks"),
        ('{"blocks": [5, 3]}', "condition"),
        ('{"blocks": [3, 3]}', "condition"),
        ('{"measure": "euclid"}', "condition.measure"),
        ('{"at": "last"}', "condition.at"),
        ('{"above": "0.2"}', "condition.above"),
        ('{"above": 1e999}', "condition.above"),
        ('{"above": null}', "condition"),
        ('{"below": 0.25}', "condition"),
        ('{"f1": 1.01}', "condition.f1"),
        ('{"held_out": {"neutral": 3}}', "condition.held_out.neutral"),
        ('{"held_out": {"positive": -3}}', "condition.held_out.positive"),
        ('{"chat": "yes"}', "condition.chat"),
        ('{"vector": "other"}', "condition.vector"),
    ],
)
def test_a_damaged_condition_is_named(text: str, where: str) -> None:
    fields = {**CONDITION, **json.loads(text)} if text != "{}" else {}
    damaged = {**metadata_to_text(VectorMetadata()), "condition": json.dumps(fields).replace("Infinity", "1e999")}
    with pytest.raises(VectorFileError, match=f"metadata field '{where}"):
        metadata_from_text(damaged)


@pytest.mark.parametrize("text", ["[]", "3", "{", '{"above": 1, "above": 2}', '{"above": NaN}'])
def test_a_condition_that_is_no_object_is_refused(text: str) -> None:
    with pytest.raises(VectorFileError, match="[Tt]he metadata field condition"):
        metadata_from_text({**metadata_to_text(VectorMetadata()), "condition": text})


def test_a_condition_is_what_a_request_takes() -> None:
    condition = FittedCondition(**CONDITION, f1=0.5, held_out={"positive": 3, "negative": 4})  # type: ignore[arg-type]
    assert condition.when("calm") == {"vector": "calm", **CONDITION}
    assert str(condition) == "cosine above 0.25 at mean_prompt, blocks 3, 5; held-out F1 0.500 of 7 prompts"
    both = FittedCondition(blocks=(3,), measure="dot", at="max_prompt", above=-1.0, below=2.0)
    assert both.when("x") == {
        "vector": "x", "blocks": [3], "measure": "dot", "at": "max_prompt", "above": -1.0, "below": 2.0,
    }  # fmt: skip
    assert str(both) == "dot above -1 and below 2 at max_prompt, block 3"


PROBE: dict[str, object] = {"blocks": {"3": {"threshold": 1.5, "platt": {"a": 2.0, "b": -1.0}}}, "at": "mean_prompt"}


def stored_probe(fields: object) -> FittedProbe | None:
    """What a reader makes of a file whose metadata have these fields of a probe."""
    text = json.dumps(fields).replace("Infinity", "1e999")
    return metadata_from_text({**metadata_to_text(VectorMetadata()), "probe": text}).probe


def test_a_probe_has_typed_blocks() -> None:
    probe = stored_probe(PROBE)
    assert probe is not None
    assert list(probe.blocks) == [3]
    a, b = probe.blocks[3].platt or (0.0, 0.0)
    assert (a, b) == (2.0, -1.0)
    assert probe.blocks[3].threshold == 1.5
    assert probe.blocks[3].auroc is None
    bare = stored_probe({"blocks": {"20": {}, "4": {"auroc": 0.75}}, "at": "every_prompt_token"})
    assert bare is not None
    assert list(bare.blocks) == [4, 20]  # ascending
    assert bare.blocks[20].platt is None
    assert str(bare) == "2 blocks, trained on every_prompt_token; held-out AUROC up to 0.750 (block 4)"


def test_a_site_is_written_unless_it_is_the_stream_after_a_block() -> None:
    plain = VectorMetadata(method="block")
    assert "site" not in metadata_to_text(plain)
    assert metadata_to_text(plain)["method"] == "block"
    assert metadata_from_text(metadata_to_text(plain)).site is Site.BLOCK
    text = metadata_to_text(VectorMetadata(site=Site.MLP))
    assert text["site"] == "mlp"
    assert metadata_from_text(text).site is Site.MLP
    with pytest.raises(VectorFileError, match="field 'site' is not usable: Input should be 'block', 'attn' or 'mlp'"):
        metadata_from_text(text | {"site": "resid_mid"})


def test_a_file_without_a_probe_reads_as_before() -> None:
    assert metadata_from_text(metadata_to_text(VectorMetadata())).probe is None
    assert "probe" not in metadata_to_text(VectorMetadata())


@pytest.mark.parametrize(
    ("changed", "where"),
    [
        ({"blocks": {}}, "probe.blocks"),
        ({"blocks": [3]}, "probe.blocks"),
        ({"blocks": {"3": None}}, "probe.blocks.3"),
        ({"blocks": {"1024": {}}}, "probe.blocks.1024"),
        ({"blocks": {"3": {"bias": 1.0}}}, "probe.blocks.3.bias"),
        ({"blocks": {"3": {"threshold": "1"}}}, "probe.blocks.3.threshold"),
        ({"blocks": {"3": {"threshold": float("inf")}}}, "probe.blocks.3.threshold"),
        ({"blocks": {"3": {"auroc": 1.5}}}, "probe.blocks.3.auroc"),
        ({"blocks": {"3": {"false_positive_rate": -0.1}}}, "probe.blocks.3.false_positive_rate"),
        ({"blocks": {"3": {"platt": [2.0, -1.0]}}}, "probe.blocks.3.platt"),
        ({"blocks": {"3": {"platt": {"a": 2.0}}}}, "probe.blocks.3.platt"),
        ({"blocks": {"3": {"platt": {"a": 2.0, "b": True}}}}, "probe.blocks.3.platt"),
        ({"blocks": {"3": {"platt": {"a": 2.0, "b": float("inf")}}}}, "probe.blocks.3.platt"),
        ({"blocks": {"3": {"platt": {"a": 2.0, "b": 1.0, "c": 0.0}}}}, "probe.blocks.3.platt"),
        ({"at": "max_prompt"}, "probe.at"),
        ({"target_false_positive_rate": 2}, "probe.target_false_positive_rate"),
        ({"held_out": {"neutral": 3}}, "probe.held_out.neutral"),
        ({"chat": "yes"}, "probe.chat"),
        ({"measure": "dot"}, "probe.measure"),
    ],
)
def test_a_damaged_probe_is_named(changed: dict[str, object], where: str) -> None:
    with pytest.raises(VectorFileError, match=f"metadata field '{re.escape(where)}"):
        stored_probe({**PROBE, **changed})


@pytest.mark.parametrize("key", ["03", "-1", "x", ""])
def test_a_probe_at_no_block_is_refused(key: str) -> None:
    with pytest.raises(VectorFileError, match="The metadata's blocks of the probe contain block"):
        stored_probe({**PROBE, "blocks": {key: {}}})
