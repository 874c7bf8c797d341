"""build-etc.py SPEC OUT: what /etc/static shows (OUT/etc), what is copied to /etc (OUT/links).

SPEC is JSON: `files` (environment.etc), `units` (name → text, where it is wanted) and
`info` (of the base: the units that Debian ships). A file of mode "symlink" becomes a link to
/etc/static; one of any other mode is a copy, listed in OUT/copies with mode and owner.
"""

import json
import sys
from pathlib import Path

spec = json.loads(Path(sys.argv[1]).read_text())
out = Path(sys.argv[2])
etc, links = out / "etc", out / "links"
system = etc / "systemd" / "system"
for directory in (system, links):
    directory.mkdir(parents=True)
debian_units = set((Path(spec["info"]) / "units").read_text().split())


def link(path: Path, target: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink() or path.exists():
        path.unlink()
    path.symlink_to(target)


for name, unit in spec["units"].items():
    template = name.split("@")[0] + "@." + name.rsplit(".", 1)[-1] if "@" in name else name
    shipped = name in debian_units or template in debian_units
    if not unit["enable"]:
        link(system / name, "/dev/null")
        continue
    if shipped and unit["override"]:
        path = system / f"{name}.d" / "overrides.conf"
    else:
        path = system / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(unit["text"])
    for kind in ("wants", "requires", "upholds"):
        for target in unit[kind]:
            source = (
                f"/usr/lib/systemd/system/{template}"
                if shipped and unit["override"]
                else f"../{template}"
            )
            link(system / f"{target}.{kind}" / name, source)
    for alias in unit["aliases"]:
        link(system / alias, name)

copies = []
for file in spec["files"]:
    path = etc / file["target"]
    path.parent.mkdir(parents=True, exist_ok=True)
    if file["text"] is not None:
        path.write_text(file["text"])
    elif file["source"] is not None:
        link(path, file["source"])
    else:
        sys.exit(f"environment.etc.{file['target']} has neither text nor source")
    if file["target"].startswith("systemd/system/"):
        continue  # that directory is one link
    shown = links / file["target"]
    shown.parent.mkdir(parents=True, exist_ok=True)
    if file["mode"] == "symlink":
        shown.symlink_to(f"/etc/static/{file['target']}")
    elif file["mode"] == "direct-symlink":
        shown.symlink_to(file["source"])
    else:
        owner, group = file["user"].lstrip("+"), file["group"].lstrip("+")
        copies.append(f"{file['mode']} {owner} {group} {file['target']}\n")
(links / "systemd").mkdir(exist_ok=True)
(links / "systemd" / "system").symlink_to("/etc/static/systemd/system")
(out / "static").symlink_to(etc)
(out / "copies").write_text("".join(copies))
