"""Methods added to vLLM's worker (`--worker-extension-cls`). Runs inside the vLLM process; imports nothing of ours.

vLLM 0.32's own `reload_weights` leaves a tied LM head as it was on CPU: the CPU build packs every linear layer, a
reload packs them again, but a tied head has no weights of its own in the checkpoint and keeps the packed old ones.
The server then answers with a mixture of two policies and HTTP 200. `load_policy` packs the head again.
"""

from __future__ import annotations

from typing import Any


class PolicyWorkerExtension:
    """Mixed into vLLM's worker class; `self` is the worker."""

    model_runner: Any
    model_config: Any
    reload_weights: Any

    def describe_policy(self) -> dict[str, Any]:
        """dtype and context length of the running model, and whether its memory can be given up."""
        config = self.model_config
        return {
            "dtype": str(config.dtype).removeprefix("torch."),
            "max_model_len": int(config.max_model_len),
            "sleep_mode": bool(config.enable_sleep_mode),
        }

    def load_policy(self, weights_path: str) -> dict[str, Any]:
        """Load the weights of a checkpoint folder in place. Answers whether a tied LM head was renewed.

        An error is answered, not raised: vLLM would end the whole process seconds after an exception in a worker.
        """
        try:
            self.reload_weights(weights_path=weights_path)
            return {"tied_head": self._renew_tied_head()}
        except Exception as error:  # whatever it was, the gateway decides what happens next
            return {"error": f"{type(error).__name__}: {error}"}

    def _renew_tied_head(self) -> bool:
        import torch
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

        if not getattr(self.model_config.hf_text_config, "tie_word_embeddings", False):
            return False
        modules: list[Any] = list(self.model_runner.get_model().modules())
        heads: list[Any] = [module for module in modules if isinstance(module, ParallelLMHead)]
        embeddings: list[Any] = [
            module for module in modules if isinstance(module, VocabParallelEmbedding) and module not in heads
        ]
        if not heads or not embeddings:
            return False  # vLLM used the embedding itself as the head: there is nothing to renew
        embedding = embeddings[0]
        with torch.no_grad():
            for head in heads:
                if head.weight.is_meta or head.weight.shape != embedding.weight.shape:
                    head.weight = embedding.weight
                elif head.weight.data_ptr() != embedding.weight.data_ptr():
                    head.weight.copy_(embedding.weight)  # in place: CUDA graphs hold this address
                head.quant_method.process_weights_after_loading(head)
        return True


def keep_seeded_requests_alive() -> None:
    """On a CPU, let a seeded request's prompt be prefilled in pieces; vLLM 0.32 would end the whole engine.

    It samples after each piece, throws the token away and rewinds the request's generator by an offset, which only CUDA
    generators have (`RuntimeError: CPU Generator does not use offset`). Here those generators are kept out of its way,
    and one that has given no token yet begins anew, so that the answer does not depend on where the prompt was cut.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    runner: Any = GPUModelRunner
    bookkeeping = runner._bookkeeping_sync

    def _bookkeeping_sync(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch = self.input_batch
        thrown_away = [int(i) for i in self.discard_request_mask.np[: batch.num_reqs].nonzero()[0]]
        held = {i: batch.generators.pop(i) for i in thrown_away if i in batch.generators}
        try:
            return bookkeeping(self, *args, **kwargs)
        finally:
            for i, generator in held.items():
                if not self.requests[batch.req_ids[i]].output_token_ids:
                    generator.manual_seed(generator.initial_seed())
                batch.generators[i] = generator

    runner._bookkeeping_sync = _bookkeeping_sync


keep_seeded_requests_alive()  # this module is imported in vLLM's worker, and nowhere else
