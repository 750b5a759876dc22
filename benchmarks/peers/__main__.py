"""What a restart costs with other servers, each restarted as its documentation says, side by side in one run.

One application, one load: new connections at random moments, clients that keep theirs, idle ones, and slow requests.
The load runs on the same processors as what it measures: compare only the rows of one table. A server that cannot be
had here is named, and left out. The exit status is 1 where a request, or a restart, of ours has failed.
"""

from __future__ import annotations

import asyncio
import sys
from datetime import UTC, datetime

import uvloop

from benchmarks.bench import Options, describe_machine, parse
from benchmarks.peers.building import MissingError
from benchmarks.peers.catalogue import PEERS
from benchmarks.peers.measuring import FULL, QUICK, measure
from benchmarks.peers.results import Result, Run
from benchmarks.peers.running import adopt_orphans
from benchmarks.peers.tables import tables


def run(options: Options) -> int:
    """Measure those that are here, and say what came out."""
    extent = QUICK if options.quick else FULL
    found = Run(describe_machine(), datetime.now(UTC).date().isoformat(), str(extent))
    adopt_orphans()
    failed = []
    for peer in PEERS:
        if options.only not in peer.name or (options.quick and not peer.is_quick):
            continue
        try:
            version = peer.provide()
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                result = runner.run(measure(peer, version, extent))
        except MissingError as error:
            found.missing[peer.name] = str(error)
            continue
        except (ExceptionGroup, OSError, RuntimeError) as error:
            if peer.is_ours:
                raise
            print(f"{peer.name}: {error}", file=sys.stderr)
            found.missing[peer.name] = f"{version} could not be measured"
            continue
        found.results.append(result)
        if options.output is not None:
            found.save(options.output / "peers.json")
        print(f"{peer.name}, {peer.how}: {failures(result)} failed of {result.requests}", flush=True)
        if peer.is_ours and (failures(result) or not all(restart.said for restart in result.restarts)):
            failed.append(peer.name)
    print("\n".join(str(table) for table in tables(found)))
    if failed:
        print(f"Requests or restarts have failed that may not: {', '.join(failed)}.", file=sys.stderr)
    return 1 if failed else 0


def failures(result: Result) -> int:
    """Return how many requests have failed in all."""
    verdicts = [verdict for verdict in (result.twice, result.broken) if verdict is not None]
    each = [restart.failures for restart in result.restarts] + [verdict.failures for verdict in verdicts]
    return sum(sum(failures.values()) for failures in each)


if __name__ == "__main__":
    sys.exit(run(parse(__doc__)))
