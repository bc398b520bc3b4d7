"""Scores of an engine, compared with float64 NumPy on the logits of a float64 Hugging Face model with hooks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from scipy import special, stats

from steer_engine import LLM, ControlVector
from steer_engine.errors import EvaluationError, SteeringRequestError
from steer_engine.evaluate.conditions import BASELINE, Condition
from steer_engine.evaluate.encode import Encoder, Question
from steer_engine.evaluate.journal import Journal
from steer_engine.evaluate.scorer import Scorer
from steer_engine.evaluate.statistics import mcnemar
from steer_engine.evaluate.sweep import sweep
from steer_engine.evaluate.tasks import Sizes, load_task, neutral_texts
from steer_engine.llm import Numbers

RUNNER = os.environ.get("STEER_TEST_RUNNER", "v1")
RUNNER_CLASS = {
    "v1": "vllm.v1.worker.cpu_model_runner.CPUModelRunner",
    "v2": "vllm.v1.worker.cpu.model_runner.CPUModelRunner",
}[RUNNER]
EPSILON = 2.0**-24
NUM_ITEMS = 50 if RUNNER == "v1" else 6


def random_vector(seed: int, norm: float, width: int = 64) -> ControlVector:
    rows = np.random.default_rng(seed).standard_normal((3, width))
    rows *= norm / np.linalg.norm(rows, axis=1, keepdims=True)
    return ControlVector(directions={block: row.astype(np.float32) for block, row in enumerate(rows)})


@pytest.fixture(scope="module")
def questions(tiny_engine: LLM) -> list[Question]:
    items = load_task("ioi", Sizes(derive=2, validation=2, test=NUM_ITEMS)).test
    return Encoder(tiny_engine.get_tokenizer(), max_tokens=768).questions(items)


@pytest.fixture(scope="module")
def conditions(tiny_engine: LLM) -> list[Condition]:
    found = [BASELINE]
    for seed, blocks, alpha, scope in ((0, "1", 1.5, "all"), (0, "0-2", -1.0, "all"), (1, "0-2", 2.0, "generation")):
        vector = random_vector(seed, norm=4.0)
        tiny_engine.vectors.add(f"v{seed}", vector)
        found.append(Condition(vector=f"v{seed}", digest=vector.digest, blocks=blocks, alpha=alpha, scope=scope))
    return found


def reference_logits(path: str, questions: Sequence[Question], conditions: Sequence[Condition]) -> np.ndarray:
    """Next-token logits `[conditions, questions, V]`, all in float64."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
    rows = []
    for condition in conditions:
        hooks = []
        if not condition.is_baseline:
            vector = random_vector(int(condition.vector[1:]), norm=4.0)
            wanted = range(3) if condition.blocks == "0-2" else [int(condition.blocks)]
            for block in wanted:
                edit = condition.alpha * torch.tensor(vector.directions[block], dtype=torch.float64)

                def steer(_module, _args, out, edit=edit, last_only=condition.scope == "generation"):  # type: ignore[no-untyped-def]
                    first = out[0] if isinstance(out, tuple) else out
                    first[:, -1 if last_only else 0 :] += edit
                    return out

                hooks.append(model.model.layers[block].register_forward_hook(steer))
        with torch.no_grad():
            for question in questions:
                rows.append(model(torch.tensor([question.prompt_ids])).logits[0, -1].numpy())
        for hook in hooks:
            hook.remove()
    return np.stack(rows).reshape(len(conditions), len(questions), -1)


def test_every_metric_equals_float64(
    tiny_engine: LLM, tiny_llama: str, questions: list[Question], conditions: list[Condition]
) -> None:
    worker = tiny_engine.steering_status()["workers"][0]
    assert worker["runner"] == RUNNER_CLASS
    assert worker["armed_blocks"] == [0, 1, 2]
    logits_CNV = reference_logits(tiny_llama, questions, conditions)
    jobs = [(question, condition) for question in questions for condition in conditions]
    scores = dict(zip([(q.id, c.key) for q, c in jobs], (s for _, s in Scorer(tiny_engine).scores(jobs)), strict=True))
    # One logit is a dot product of 64 terms behind three blocks of four matrix products of 64 to 128 terms, each term
    # rounded: at most 64 + 3 * (4 * 64 + 2 * 128) roundings of numbers no larger than the largest logit.
    delta = (64 + 3 * (4 * 64 + 2 * 128)) * EPSILON * float(np.abs(logits_CNV).max())
    assert delta < 0.002
    moved = 0.0
    for c, condition in enumerate(conditions):
        for n, question in enumerate(questions):
            found = scores[question.id, condition.key]
            base, steered = logits_CNV[0, n], logits_CNV[c, n]
            p, q = special.softmax(base), special.softmax(steered)
            spread = float(np.ptp(np.log(q)))
            assert found["kl"] == pytest.approx(stats.entropy(p, q), abs=2 * delta * (1 + spread))
            assert found["entropy"] == pytest.approx(stats.entropy(q, base=2), abs=2 * delta * (1 + spread))
            ids = list(question.answer_ids)
            right, wrong = q[ids[question.correct]], sum(q[ids]) - q[ids[question.correct]]
            assert found["logp_correct"] == pytest.approx(np.log(right), abs=2 * delta)
            assert found["logp_incorrect"] == pytest.approx(np.log(wrong), abs=2 * delta)
            assert found["mass_correct"] == pytest.approx(right, rel=4 * delta)
            assert found["mass_incorrect"] == pytest.approx(wrong, rel=4 * delta)
            assert found["share_correct"] == pytest.approx(right / (right + wrong), rel=4 * delta)
            assert found["margin"] == pytest.approx(np.log(right / wrong), abs=4 * delta)
            if abs(np.log(right / wrong)) > 4 * delta:
                assert found["accuracy"] == float(right > wrong)
            top_two = np.sort(steered)[-2:], np.sort(base)[-2:]
            if min(np.ptp(pair) for pair in top_two) > 4 * delta:
                assert found["top_changed"] == float(p.argmax() != q.argmax())
            moved = max(moved, found["kl"])
    assert moved > 100 * delta


def test_missing_unsteered_jobs_run_for_kl(
    tiny_engine: LLM, questions: list[Question], conditions: list[Condition]
) -> None:
    requested = [(question, conditions[1]) for question in questions[:6]]
    alone = list(Scorer(tiny_engine).scores(requested))
    assert [job for job, _ in alone] == requested
    # One question per batch.
    split = list(
        Scorer(tiny_engine, batch=2).scores([(q, c) for q in questions[:6] for c in (conditions[2], conditions[1])])
    )
    for (_, score), (_, again) in zip(alone, split[1::2], strict=True):
        assert again == pytest.approx(score, abs=1e-3)
        assert score["kl"] > 0.01


def test_a_planted_effect_is_found(tiny_engine: LLM, tiny_llama: str, tmp_path: Path) -> None:
    """At the last block, the difference of two rows of the head, scaled by the norm's weight, favours one token."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    head, weight = model.lm_head.weight.detach().numpy(), model.model.norm.weight.detach().numpy()
    favoured, other = 65, 66
    row = (head[favoured] - head[other]) * weight
    vector = ControlVector(directions={2: row / np.linalg.norm(row)})
    tiny_engine.vectors.add("planted", vector)
    requested = [
        Question(id=q.id, prompt_ids=q.prompt_ids, answer_ids=(favoured, other)) for q in questions_of(tiny_engine, 60)
    ]
    planted = Condition(vector="planted", digest=vector.digest, blocks="2", alpha=8.0)
    against = Condition(vector="planted", digest=vector.digest, blocks="2", alpha=-8.0)
    with Journal(tmp_path / "scores.jsonl", {}) as journal:
        found = sweep(Scorer(tiny_engine), journal, "test", requested, [BASELINE, planted, against])
    plain, up, down = (found[c.key] for c in (BASELINE, planted, against))
    raised = up["mass_correct"] > plain["mass_correct"]
    assert mcnemar(int(raised.sum()), int((~raised).sum())) < 0.001
    assert (up["margin"] > plain["margin"]).all()
    assert (down["margin"] < plain["margin"]).all()
    gained = int(((up["accuracy"] == 1) & (down["accuracy"] == 0)).sum())
    assert mcnemar(gained, int(((up["accuracy"] == 0) & (down["accuracy"] == 1)).sum())) < 0.001


def questions_of(llm: LLM, count: int) -> list[Question]:
    items = load_task("ioi", Sizes(derive=2, validation=2, test=count), seed=9).test
    return Encoder(llm.get_tokenizer(), max_tokens=768).questions(items)


def test_exact_matches_count_what_the_model_writes(tiny_engine: LLM) -> None:
    encoder = Encoder(tiny_engine.get_tokenizer(), max_tokens=768)
    ids = tuple(encoder.ids("The train leaves"))
    scorer = Scorer(tiny_engine, generate=8)
    said = scorer.continuations([Question(id="a", prompt_ids=ids)], BASELINE, 8)[0]
    right, wrong = (
        Question(id="a", prompt_ids=ids, target=said),
        Question(id="b", prompt_ids=ids, target="no such text"),
    )
    neutral = Question(id="c", prompt_ids=ids)
    scores = [score for _, score in scorer.scores([(right, BASELINE), (wrong, BASELINE), (neutral, BASELINE)])]
    assert [score.get("accuracy") for score in scores] == [1.0, 0.0, None]
    assert scores[0]["length"] == 8.0
    assert scores[2]["kl"] == 0.0


def test_a_distribution_that_is_not_finite_is_an_error() -> None:
    class Broken:
        """Returns the numbers of an engine whose residual stream overflowed."""

        def score(self, prompts: list[list[int]], **_: object) -> list[Numbers]:
            return [Numbers(answers=[], kl=float("nan"), entropy=float("nan"), top_changed=True) for _ in prompts]

    with pytest.raises(EvaluationError, match="not finite"):
        list(Scorer(Broken()).scores([(Question(id="a", prompt_ids=(1, 2)), BASELINE)]))  # type: ignore[arg-type]


def test_a_later_baseline_is_refused(tiny_engine: LLM) -> None:
    with pytest.raises(ValueError, match="Prompt 0 has baseline 1; it must be the prompt itself or an earlier one"):
        tiny_engine.score([[1, 2], [1, 2]], steering=[None, None], baselines=[1, 1], answers=[(), ()])


def test_an_answer_outside_the_vocabulary_is_refused(tiny_engine: LLM) -> None:
    with pytest.raises(ValueError, match="Answer token 512 is not in the vocabulary, which has 0 to 511"):
        tiny_engine.score([[1, 2]], steering=[None], baselines=[0], answers=[(3, 512)])


def test_chunked_prompts_have_the_same_scores(tiny_engine: LLM) -> None:
    """Long prompts take several steps, beside short ones. Logits of an earlier chunk must not be scored."""
    vector = random_vector(0, norm=4.0)
    tiny_engine.vectors.add("v0", vector)
    spec = {"edits": [{"vector": "v0", "scale": 1.0}]}
    random = np.random.default_rng(3)
    prompts = [random.integers(10, 200, length).tolist() for length in (700, 30, 300, 650)]
    together = tiny_engine.score(
        [prompt for prompt in prompts for _ in range(2)],
        steering=[None, spec] * 4, baselines=[0, 0, 2, 2, 4, 4, 6, 6], answers=[(5, 6)] * 8,
    )  # fmt: skip
    for number, prompt in enumerate(prompts):
        alone = tiny_engine.score([prompt] * 2, steering=[None, spec], baselines=[0, 0], answers=[(5, 6)] * 2)
        for mine, its in zip(together[2 * number : 2 * number + 2], alone, strict=True):
            assert mine.answers == pytest.approx(its.answers, abs=1e-3)
            assert mine.kl == pytest.approx(its.kl, abs=1e-3)
        assert alone[1].kl > 0.01


def test_a_client_cannot_request_scores(tiny_engine: LLM) -> None:
    """A client's `vllm_xargs` arrive in this form. No one would collect the scores."""
    requested = {"_steer_score": {"key": "a", "baseline": "a", "answers": []}}
    with pytest.raises(SteeringRequestError, match="'_steer_score' is a reserved key"):
        tiny_engine._frontend.compile(requested, 8, 1)


def test_neutral_texts_are_many_and_short() -> None:
    texts = neutral_texts()
    assert len(texts) == len(set(texts)) >= 40
    assert all(text == text.strip() and text[-1].isalpha() for text in texts)


@pytest.mark.slow
@pytest.mark.skipif(RUNNER == "v2", reason="this is the run on V2")
def test_the_v2_runner_has_the_same_scores() -> None:
    """Runs in its own process, because Triton's interpreter must be enabled before torch is imported."""
    command = [sys.executable, "-m", "pytest", "-q", f"{__file__}::test_every_metric_equals_float64"]
    environment = os.environ | {"STEER_TEST_RUNNER": "v2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=290, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "1 passed" in done.stdout
