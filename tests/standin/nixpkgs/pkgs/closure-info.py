"""closure-info.py ATTRS OUT: a closure, from nix's structured attributes, for --load-db."""

import json
import sys
from pathlib import Path
from typing import Any

closure = json.loads(Path(sys.argv[1]).read_text())["closure"]
closure.sort(key=lambda info: info["path"])
out = Path(sys.argv[2])
out.mkdir()


def registration(info: dict[str, Any]) -> str:
    lines = [
        info["path"],
        info["narHash"],
        info["narSize"],
        "",  # who made it
        len(info["references"]),
        *info["references"],
    ]
    return "".join(f"{line}\n" for line in lines)


(out / "store-paths").write_text("".join(f"{info['path']}\n" for info in closure))
(out / "registration").write_text("".join(map(registration, closure)))
(out / "total-nar-size").write_text(f"{sum(info['narSize'] for info in closure)}\n")
