"""The gold judge watches a run: each iteration is judged when it is decided, and the verdict goes to the stack.

The loop never reads a verdict; the dashboard shows them beside the proxy's figures.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean as mean

from examples.tiny_world.judge import GoldJudge, WinRate, win_rate
from examples.tiny_world.observers import Background
from examples.tiny_world.progress import Progress
from examples.tiny_world.report import Example, IterationReport
from ratchet.client import RatchetClient
from services.contracts.errors import Conflict, RatchetError
from services.contracts.judgements import Verdict
from services.contracts.rollouts import Rollout
from services.contracts.runs import IterationRecord

JUDGE = "gold"
LOOK_INTERVAL_SECONDS = 2.0
"""An iteration takes half a minute or more."""
PAGE = 500
EXAMPLES_SHOWN = 5


@dataclass(frozen=True)
class Judged:
    """One iteration's held-out answers, their gold utilities by prompt id, and how often they beat the SFT model's."""

    record: IterationRecord
    rollouts: dict[str, Rollout]
    utilities: dict[str, list[float]]
    wins: WinRate
    utility: float
    prompts: int


class GoldJudging(Background):
    """Judges a run's iterations as they are decided and posts each verdict, between enter and exit."""

    interval = LOOK_INTERVAL_SECONDS

    def __init__(self, client: RatchetClient, run: str, judge: GoldJudge, progress: Progress) -> None:
        super().__init__()
        self._client = client
        self._run = run
        self._judge = judge
        self._progress = progress
        self._judged: dict[int, Judged] = {}

    def once(self) -> None:
        """Judge what is new. An outage is no error: the next round, or `finish`, makes up for it."""
        try:
            self.judge_new()
        except RatchetError:
            return

    def finish(self) -> tuple[Judged, ...]:
        """Every decided iteration, in order; to be called after exit. Raises RatchetError when one cannot be judged."""
        self.judge_new()
        return tuple(self._judged[number] for number in sorted(self._judged))

    def judge_new(self) -> None:
        """Judge every decided iteration that was not judged yet, the baseline first, and post the verdicts."""
        records = [it.record for it in self._client.run(self._run).iterations if it.record is not None]
        for record in sorted(records, key=lambda record: record.iteration):
            if record.iteration not in self._judged:
                judged = self._judge_one(record)
                self._post(judged)
                self._judged[record.iteration] = judged

    def _judge_one(self, record: IterationRecord) -> Judged:
        rollouts = heldout_rollouts(self._client, self._run, record.iteration)
        utilities = {key: gold_utilities(self._judge, rollout) for key, rollout in rollouts.items()}
        reference = self._judged[0].utilities if record.iteration else utilities
        keys = sorted(set(utilities) & set(reference))
        mine = [utilities[key] for key in keys]
        return Judged(
            record=record,
            rollouts=rollouts,
            utilities=utilities,
            wins=win_rate(mine, [reference[key] for key in keys]),
            utility=mean([mean(each) for each in mine]),
            prompts=len(keys),
        )

    def _post(self, judged: Judged) -> None:
        wins, number = judged.wins, judged.record.iteration
        verdict = Verdict(
            win_rate=wins.rate, low=wins.low, high=wins.high, prompts=judged.prompts, score=judged.utility
        )
        try:
            self._client.judge(self._run, number, JUDGE, verdict)
        except Conflict as error:  # judged by another version of this judge; what is published stays
            self._progress.remark(f"the gold judge's earlier verdict of iteration {number} stays: {error.detail}")
            return
        if number:
            self._progress.remark(
                f"gold judge: iteration {number} wins {wins.rate:.0%} of comparisons with the SFT model "
                f"(95 % interval {wins.low:.0%} to {wins.high:.0%})"
            )


def iteration_reports(judged: tuple[Judged, ...]) -> tuple[IterationReport, ...]:
    """The rows of the report."""
    return tuple(
        IterationReport(
            name="SFT" if each.record.iteration == 0 else f"iter {each.record.iteration}",
            version=each.record.version,
            decision=each.record.decision,
            proxy_reward=each.record.metrics.proxy_reward or 0.0,
            gold_utility=each.utility,
            gold_win_rate=each.wins.rate,
            gold_win_rate_ci=(each.wins.low, each.wins.high),
            response_tokens=each.record.metrics.response_tokens or 0.0,
            kl=each.record.metrics.kl,
            seconds_by_stage=each.record.seconds_by_stage,
        )
        for each in judged
    )


def heldout_rollouts(client: RatchetClient, run: str, iteration: int) -> dict[str, Rollout]:
    """All held-out rollouts of an iteration, by prompt id."""
    found: dict[str, Rollout] = {}
    total = 1
    while len(found) < total:
        page = client.rollouts(run, iteration, evaluation=True, offset=len(found), limit=PAGE)
        if not page.rows:
            break
        total = page.total
        found.update((row.rollout.prompt_id, row.rollout) for row in page.rows)
    return found


def gold_utilities(judge: GoldJudge, rollout: Rollout) -> list[float]:
    """Gold utility of each of a prompt's responses."""
    return [judge.utility(rollout.messages[-1].content, response.text) for response in rollout.responses]


def pick_examples(judged: tuple[Judged, ...]) -> tuple[Example, ...]:
    """A fair few of the SFT model against the last promoted policy.

    They are evenly spread over the prompts by how much the first answer changed, best and worst included.
    """
    first = judged[0]
    last = next((each for each in reversed(judged) if each.record.decision == "promoted"), first)

    def change(key: str) -> tuple[float, str]:
        return last.utilities[key][0] - first.utilities[key][0], key

    keys = sorted(set(first.rollouts) & set(last.rollouts), key=change)
    count = min(EXAMPLES_SHOWN, len(keys))
    spread = [keys[round(i * (len(keys) - 1) / max(1, count - 1))] for i in range(count)]
    return tuple(
        Example(
            prompt=first.rollouts[key].messages[-1].content,
            before=first.rollouts[key].responses[0].text,
            before_utility=first.utilities[key][0],
            after=last.rollouts[key].responses[0].text,
            after_utility=last.utilities[key][0],
        )
        for key in reversed(spread)
    )
