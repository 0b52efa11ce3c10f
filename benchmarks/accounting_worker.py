"""One engine in a process of its own, for `benchmarks.accounting`: jobs come in as lines of JSON, answers go out.

A peer that runs out of time or memory takes only this process with it. What a package prints does not reach the
parent: standard output is kept for answers.

    echo '{"method": "epsilon", "arguments": {"mechanisms": [{"mech": "gaussian", "sigma": 1.0, "count": 1}],
        "delta": 1e-5, "relation": "add_remove"}}' | python -m benchmarks.accounting_worker "accountants PRV"
"""

from __future__ import annotations

import functools
import gc
import json
import os
import resource
import sys
import time
import warnings
from typing import Any

from benchmarks.accounting_engines import Engine, make_engine, plain

MEMORY_BYTES = 6 * 2**30  # of address space


def main() -> None:
    """Answer jobs until the input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    engine = make_engine(sys.argv[1])
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        print(json.dumps(answer(engine, json.loads(line))), file=answers)


def answer(engine: Engine, job: dict[str, Any]) -> dict[str, Any]:
    """Run one job from empty caches; its seconds are of this call alone.

    Args:
        engine: who answers.
        job: "method" and "arguments"; where there is a "before", that job is run first, and what it cached kept.

    Returns:
        status "ok" with lower and upper, or "unsupported" or "failed" with the text; seconds and warnings.
    """
    clear_caches(engine.package)
    if "before" in job:
        getattr(engine, job["before"]["method"])(**job["before"]["arguments"])
    gc.collect()
    record: dict[str, Any] = {"status": "ok", "lower": None, "upper": None, "text": ""}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cpu, wall = time.process_time(), time.perf_counter()
        try:
            lower, upper = getattr(engine, job["method"])(**job["arguments"])
            record |= {"lower": plain(lower), "upper": plain(upper)}
        except NotImplementedError as refusal:
            record |= {"status": "unsupported", "text": str(refusal)}
        except Exception as failure:  # whatever a peer raises is the result
            record |= {"status": "failed", "text": f"{type(failure).__name__}: {failure}"[:200]}
        record |= {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}
    record["warnings"] = sorted({f"{w.category.__name__}: {w.message}"[:120] for w in caught})
    return record


def clear_caches(package: str) -> None:
    """Empty every functools cache of `package`."""
    cache_type = type(functools.lru_cache(clear_caches))
    for thing in gc.get_objects():
        if isinstance(thing, cache_type) and (thing.__module__ or "").split(".")[0] == package:
            thing.cache_clear()


if __name__ == "__main__":
    main()
