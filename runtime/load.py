"""From a bundle to an engine. Serving takes a VerifiedBundle; only the ``logits`` command takes a built one."""

from __future__ import annotations

from appliance.bundle import BuiltBundle, VerifiedBundle
from appliance.errors import EngineError
from appliance.model import OP_DOMAIN, OP_VERSION
from appliance.wire import FULL
from runtime.backends.ort import OrtBackend
from runtime.engine import Engine


def load_engine(
    bundle: BuiltBundle | VerifiedBundle, *, threads: int, context_tokens: int, max_sequences: int = 1,
    profile: str = FULL,
) -> Engine:  # fmt: skip
    """Open the graph of the bundle's ``profile`` on the CPU.

    Raises UsageError naming the profiles there are, EngineError when the op set or the graph is not ours to run.
    ``context_tokens`` is cut to what the model was made for (max_position_embeddings).
    """
    spec = bundle.spec
    if (spec.op_domain, spec.op_version) != (OP_DOMAIN, OP_VERSION):
        found = f"{spec.op_domain} {spec.op_version}"
        raise EngineError(f"{bundle.bundle_id}: op set {found}, this runtime has {OP_DOMAIN} {OP_VERSION}")
    backend = OrtBackend(bundle.graph(profile), threads=threads)
    context_tokens = min(context_tokens, spec.config.max_position_embeddings)
    return Engine(spec, backend, context_tokens=context_tokens, max_sequences=max_sequences, profile=profile)
