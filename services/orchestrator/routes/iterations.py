"""One iteration of a run: its stages, pairs, rollouts and judgements."""

# pyright: reportUnusedFunction=false

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Path, Query

from services.contracts.browsing import PairDetail, PairPage, PairPageQuery
from services.contracts.judgements import Judgement, Verdict
from services.contracts.model import Name
from services.contracts.runs import IterationView, RolloutPage
from services.orchestrator.pair_reading import pair_detail, pair_page
from services.orchestrator.rollout_reading import rollout_page
from services.orchestrator.routes.parameters import Iteration, Limit, Offset, RunId, Runs
from services.platform.openapi import problems
from services.platform.store import ArtifactStore

PREFIX = "/runs/{run}/iterations/{iteration}"


def controlling() -> APIRouter:
    """Routes that need the token."""
    router = APIRouter(tags=["iterations"], prefix=PREFIX)

    @router.put(
        "/judgements/{judge}", summary="Record what a judge says of the iteration's policy",
        responses=problems(404, 409, 503),
    )  # fmt: skip
    async def judge(
        run: RunId, iteration: Iteration, judge: Annotated[Name, Path(description="Who judged.")], body: Verdict,
        runs: Runs,
    ) -> Judgement:  # fmt: skip
        """Written once: the same verdict again is the same judgement, another one is refused with 409. Nothing in the
        loop reads it; it is shown beside the gate's decision, of which there must be one."""
        return await runs.judge(run, iteration, judge, body)

    return router


def reading(store: ArtifactStore) -> APIRouter:
    """Routes that anybody may read."""
    router = APIRouter(tags=["iterations"], prefix=PREFIX, responses=problems(404))

    @router.get("", summary="One iteration", responses=problems(503))
    async def iteration(run: RunId, iteration: Iteration, runs: Runs) -> IterationView:
        """Its stages, live while it is not decided; then its record and what judges say of it."""
        return await runs.iteration(run, iteration)

    @router.get("/pairs", summary="The iteration's preference pairs: filter, sort, page")
    async def pairs(run: RunId, iteration: Iteration, runs: Runs, query: Annotated[PairPageQuery, Query()]) -> PairPage:
        """A pair's number names it for good, whatever the filter and the order it was found with."""
        await asyncio.to_thread(runs.runbook.record, run)
        return await asyncio.to_thread(pair_page, store, run, iteration, query, query.offset, query.limit)

    @router.get("/pairs/{number}", summary="A pair among all responses it was chosen from")
    async def pair(
        run: RunId, iteration: Iteration, runs: Runs,
        number: Annotated[int, Path(ge=0, description="As `numbers` of the page names it.")],
    ) -> PairDetail:  # fmt: skip
        """The prompt and its n responses in the order they were sampled, with raw rewards; two of them marked."""
        record = await asyncio.to_thread(runs.runbook.record, run)
        return await asyncio.to_thread(pair_detail, store, record, iteration, number)

    @router.get("/rollouts", summary="The iteration's rollouts with their rewards")
    async def rollouts(
        run: RunId, iteration: Iteration, runs: Runs, offset: Offset = 0, limit: Limit = 50,
        evaluation: Annotated[bool, Query(description="The held-out prompts instead.")] = False,
    ) -> RolloutPage:  # fmt: skip
        """What is published so far; rewards as far as they are scored."""
        record = await asyncio.to_thread(runs.runbook.record, run)
        return await asyncio.to_thread(rollout_page, store, record, iteration, offset, limit, evaluation=evaluation)

    return router
