"""What is refused before it serves: wrong folders, wrong configurations, models that do not prove themselves."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from services.contracts.errors import CheckpointRefused, InvalidInput
from services.contracts.scores import LogprobItem, ScoreItem, ScorerSpec
from services.platform.store import ArtifactStore
from services.reward.bradley_terry import BradleyTerryScorer
from services.reward.loading import make_loader
from services.reward.logprobs import LogprobScorer
from services.reward.scorers import TokenSequence
from services.reward.settings import RewardSettings
from tests.fixtures.models import make_model, make_policy
from tests.fixtures.reward import TOKEN, make_classifier, make_reward_model

# The first test imports transformers' models, which took 40 s while the machine was busy
pytestmark = pytest.mark.timeout(180)


def load(root: Path, folder: str, kind: Any = "bradley_terry", dtype: str = "stored", **spec: Any) -> Any:
    settings = RewardSettings(token=TOKEN, store_url=str(root), reward_dtype=dtype, reward_threads=1)  # pyright: ignore[reportArgumentType]
    return make_loader(ArtifactStore(str(root)), settings)("default", ScorerSpec(kind=kind, checkpoint=folder, **spec))


def test_a_good_reward_model_serves_with_its_measured_deviations(tmp_path: Path) -> None:
    manifest = make_reward_model(tmp_path / "models/rm", seed=1)
    scorer = load(tmp_path, "models/rm")
    assert isinstance(scorer, BradleyTerryScorer)
    assert scorer.info.revision == manifest.version
    assert scorer.info.parameters == manifest.parameters
    assert scorer.info.proofs["leading_bos"] == 1.0
    assert 0 <= scorer.info.proofs["padded_batch"] < 1e-4
    assert 0 <= scorer.info.proofs["score_probes"] < 1e-4
    messages = [{"role": "user", "content": "Name three colours."}]
    items = [ScoreItem.model_validate({"messages": messages, "responses": ["Red.", "Blue and green." * 4]})]
    sequences = scorer.prepare(items)
    model = make_classifier(1)
    with torch.no_grad():
        expected = [float(model(torch.tensor([s.token_ids])).logits[0, 0]) for s in sequences]
    assert scorer.evaluate(sequences) == pytest.approx(expected, abs=1e-4)


def test_a_score_is_read_at_the_last_token_even_when_it_is_a_pad(tmp_path: Path) -> None:
    make_reward_model(tmp_path / "models/rm", seed=1)
    scorer = load(tmp_path, "models/rm")
    with_pad, without = TokenSequence([5, 9, 11, 0], ""), TokenSequence([5, 9, 11], "")
    a, b = scorer.evaluate([with_pad, without])
    assert a != pytest.approx(b, abs=1e-3)


def test_bfloat16_is_proved_with_the_tolerance_of_its_rounding(tmp_path: Path) -> None:
    make_reward_model(tmp_path / "models/rm", seed=1, initializer_range=0.05)
    info = load(tmp_path, "models/rm", dtype="bfloat16").info
    assert info.dtype == "bfloat16"
    assert info.proofs["score_probes"] > 1e-5


def nan_weights(model: Any) -> None:
    model.model.layers[0].mlp.down_proj.weight[0, 0] = math.nan


def another_head(model: Any) -> None:
    model.score.weight.mul_(-1)


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        ({"change": nan_weights}, "gives nan"),
        ({"change": another_head}, "self-proof"),
        ({"pad_token_id": 2}, "config.json has pad_token_id 2 and the tokenizer 0"),
        ({"pad_token_id": None}, "no pad token"),
        ({"eos_token_id": [2, 0]}, "its pad token is its eos token"),
        ({"num_labels": 2}, "2 labels"),
        ({"manifest": {"score_probes": ()}}, "no score_probes"),
        ({"manifest": {"kind": "policy"}}, "it is a policy"),
        ({"manifest": {"architecture": "Qwen3ForSequenceClassification"}}, "config.json says architecture"),
        ({"manifest": {"dtype": "float64"}}, "float64"),
    ],
)
def test_a_doubtful_reward_model_is_refused_with_the_reason(tmp_path: Path, made: dict[str, Any], reason: str) -> None:
    make_reward_model(tmp_path / "models/rm", seed=1, **made)
    with pytest.raises(CheckpointRefused, match=reason) as error:
        load(tmp_path, "models/rm")
    assert error.value.field == "checkpoint"


def test_a_policy_passed_off_as_a_reward_model_is_refused_for_its_missing_head(tmp_path: Path) -> None:
    from tests.fixtures.models import write_manifest

    folder = tmp_path / "models/rm"
    make_policy(folder, tied=False, seed=1, version="models/rm")
    write_manifest(folder, kind="reward_model", version="x", tied_embeddings=False, parameters=1,
                   architecture="LlamaForCausalLM")  # fmt: skip
    with pytest.raises(CheckpointRefused, match=r"labels|do not fit"):
        load(tmp_path, "models/rm")


def test_longer_than_the_model_takes_cannot_be_asked_for(tmp_path: Path) -> None:
    make_reward_model(tmp_path / "models/rm", seed=1)
    with pytest.raises(InvalidInput, match="at most 256") as error:
        load(tmp_path, "models/rm", max_tokens=257)
    assert error.value.field == "max_tokens"


def test_a_logprob_scorer_gives_what_transformers_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_policy(tmp_path / "models/sft", tied=True, seed=3, version="models/sft")
    scorer = load(tmp_path, "models/sft", kind="logprob")
    assert isinstance(scorer, LogprobScorer)
    assert scorer.info.proofs["logprob_probes"] < 1e-4
    item = LogprobItem(prompt_token_ids=(1, 7, 8, 9), response_token_ids=((20, 21, 2), (30,) * 50, (2,)))
    model = make_model(tied=True, seed=3)
    expected = []
    for response in item.response_token_ids:
        ids = torch.tensor([[*item.prompt_token_ids, *response]])
        with torch.no_grad():
            logprobs = model(ids).logits.log_softmax(-1)[0]
        expected.append(sum(float(logprobs[k - 1, ids[0, k]]) for k in range(4, ids.shape[1])))
    sequences = scorer.prepare([item])
    assert scorer.evaluate(sequences) == pytest.approx(expected, abs=1e-3)
    monkeypatch.setattr("services.reward.logprobs.LOGITS_AT_ONCE", 1000)  # two positions at a time
    assert scorer.evaluate(sequences) == pytest.approx(expected, abs=1e-3)


def test_log_prob_requests_that_make_no_sense_are_named(tmp_path: Path) -> None:
    make_policy(tmp_path / "models/sft", tied=True, seed=3, version="models/sft")
    scorer = load(tmp_path, "models/sft", kind="logprob")
    for prompt, responses, field in [
        ((1, 2), ((3,), (4, 384)), "items.0.response_token_ids.1.1"),
        ((1, -1), ((3,),), "items.0.prompt_token_ids.1"),
        ((1, 2), ((3,), ()), "items.0.response_token_ids.1"),
        ((1,) * 200, ((3,), (4,) * 57), "items.0.response_token_ids.1"),
    ]:
        with pytest.raises(InvalidInput) as error:
            scorer.prepare([LogprobItem(prompt_token_ids=prompt, response_token_ids=responses)])
        assert error.value.field == field
    with pytest.raises(InvalidInput, match="exact token ids"):
        load(tmp_path, "models/sft", kind="logprob", truncate="left")


def test_a_reference_that_is_not_the_model_of_its_manifest_is_refused(tmp_path: Path) -> None:
    from tests.fixtures.models import write_manifest

    right = make_policy(tmp_path / "models/a", tied=True, seed=1, version="models/a")
    make_policy(tmp_path / "models/b", tied=True, seed=2, version="models/b")
    write_manifest(tmp_path / "models/b", version="models/b", tied_embeddings=True, parameters=1,
                   logprob_probes=right.logprob_probes)  # fmt: skip
    with pytest.raises(CheckpointRefused, match="self-proof"):
        load(tmp_path, "models/b", kind="logprob")
