"""Split learning: one network over several parties, with per-sample privacy across the cut.

run = SplitRun(graph, optimizers, {"x": x, "y": y}, plan)  # graph: vanilla(...), u_shaped(...), vertical(...), ...
run.run()
print(run.report(delta=1e-5))

`SplitClient` and `SplitServer` are the same parties on machines of their own, over a `Channel`.
"""

from dpdl.split.certificates import make_certificates
from dpdl.split.channel import Channel, Packet
from dpdl.split.client import SplitClient
from dpdl.split.clip import JointClip, PartClip
from dpdl.split.columns import Columns
from dpdl.split.cut_release import CutRelease
from dpdl.split.door import ReleaseDoor
from dpdl.split.gradient_release import GradientRelease
from dpdl.split.graph import Cut, Head, Part, SplitGraph
from dpdl.split.grpc_channel import GrpcChannel, serve
from dpdl.split.handshake import AgreedChannel, ManifestGate
from dpdl.split.labels import LabelStore, MemoizedRandomizedResponse
from dpdl.split.local_channel import LocalChannel
from dpdl.split.manifest import Manifest, SignedManifest, agree
from dpdl.split.outlet import Outlet
from dpdl.split.probe import probe_rows
from dpdl.split.releaser import CachedRelease, RowReleaser
from dpdl.split.replay import ReplayGuard
from dpdl.split.report import split_report
from dpdl.split.retrying import RetryingChannel
from dpdl.split.row_account import RowAccount
from dpdl.split.row_cache import RowCache
from dpdl.split.server import SplitServer
from dpdl.split.session import SplitRun
from dpdl.split.splitfed import SplitFed
from dpdl.split.tls import MutualTLS
from dpdl.split.topologies import ColumnJoin, chain, extended, multi_task, u_shaped, vanilla, vertical
from dpdl.split.weight_sync import TurnTaking, WeightShelf

__all__ = [
    "AgreedChannel",
    "CachedRelease",
    "Channel",
    "ColumnJoin",
    "Columns",
    "Cut",
    "CutRelease",
    "GradientRelease",
    "GrpcChannel",
    "Head",
    "JointClip",
    "LabelStore",
    "LocalChannel",
    "Manifest",
    "ManifestGate",
    "MemoizedRandomizedResponse",
    "MutualTLS",
    "Outlet",
    "Packet",
    "Part",
    "PartClip",
    "ReleaseDoor",
    "ReplayGuard",
    "RetryingChannel",
    "RowAccount",
    "RowCache",
    "RowReleaser",
    "SignedManifest",
    "SplitClient",
    "SplitFed",
    "SplitGraph",
    "SplitRun",
    "SplitServer",
    "TurnTaking",
    "WeightShelf",
    "agree",
    "chain",
    "extended",
    "make_certificates",
    "multi_task",
    "probe_rows",
    "serve",
    "split_report",
    "u_shaped",
    "vanilla",
    "vertical",
]
