"""Flower's side of the server."""

import time

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp

from dpdl.federated.flower import DPStrategy
from dpdl_flower.task import accuracy, make_server, write_outcome

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """All rounds."""
    settings = context.run_config
    server = make_server(settings)
    strategy = DPStrategy(server, clients=int(settings["clients"]), timeout=float(settings["timeout"]))

    def evaluate(round: int, arrays: ArrayRecord) -> MetricRecord:
        return MetricRecord({"accuracy": accuracy(settings, server.state)})

    began = time.monotonic()
    strategy.start(grid, num_rounds=int(settings["rounds"]), evaluate_fn=evaluate)
    outcomes = [dict(summary.private.outcomes) for summary in strategy.summaries]
    write_outcome(settings, server, seconds=round(time.monotonic() - began, 1), outcomes=outcomes)
