"""Draining a running engine, loading weights into it, and proving what it serves."""

from __future__ import annotations

from services.contracts.errors import SwapFailed
from services.generator import metrics
from services.generator.checkpoint_checks import Checkpoint
from services.generator.engine_client import EngineClient, EngineDescription
from services.generator.gate import Gate
from services.generator.probes import Proof, Tolerance, judge, usable_probes
from services.generator.settings import GeneratorSettings

INTERRUPT_SECONDS = 5.0
"""An interrupted request needs no more to let go of its connection to vLLM."""


class NotProven(SwapFailed):
    """The engine does not serve what the checkpoint's manifest promises."""


async def drain_for_change(gate: Gate, settings: GeneratorSettings) -> None:
    """Empty a closed gate: what has sent nothing is taken back, begun streams get their time, then they are ended."""
    if not await gate.drain(settings.generator_drain_seconds):
        gate.interrupt(ticket for ticket in gate.in_flight() if not ticket.committed)
        if not await gate.drain(settings.generator_stream_drain_seconds):
            gate.interrupt(gate.in_flight())
            await gate.drain(INTERRUPT_SECONDS)


def tolerance_for(dtype: str, settings: GeneratorSettings) -> Tolerance:
    """Allowed deviation for the engine's dtype; an unknown dtype is treated as the coarsest."""
    values = {"float32": settings.generator_tolerance_float32, "float16": settings.generator_tolerance_float16}
    return Tolerance(*values.get(dtype, settings.generator_tolerance_bfloat16))


async def prove(
    client: EngineClient,
    checkpoint: Checkpoint,
    engine: EngineDescription,
    tolerance: Tolerance,
    old: Checkpoint | None = None,
) -> Proof:
    """Compare what the engine serves with the checkpoint's manifest, and with the old one's.

    Raises:
        NotProven: saying by how much it is off.
    """
    probes = usable_probes(checkpoint.manifest.logprob_probes, engine.max_model_len)
    if not probes:
        raise NotProven(
            f"no probe of {checkpoint.version} fits the served context of {engine.max_model_len} tokens; raise "
            "RATCHET_GENERATOR_MAX_MODEL_LEN"
        )
    served = await client.prompt_logprobs(probes)
    proof = judge(probes, served, tolerance, old.manifest.logprob_probes if old else ())
    if not proof.proven:
        raise NotProven(f"{checkpoint.version} is not what the engine serves: {proof.reason}")
    metrics.PROOF_DEVIATION.set(proof.largest)
    return proof


async def load_proven(
    client: EngineClient,
    checkpoint: Checkpoint,
    engine: EngineDescription,
    tolerance: Tolerance,
    old: Checkpoint | None,
) -> Proof:
    """Swap weights in place: pause, load, resume, forget the cache, prove. No request may be in flight.

    Raises:
        RatchetError: whatever step failed. What the engine serves is then unknown.
    """
    await client.pause()
    try:
        await client.load(checkpoint.local)
        await client.reset_prefix_cache()
    finally:
        await client.resume()
    return await prove(client, checkpoint, engine, tolerance, old)
