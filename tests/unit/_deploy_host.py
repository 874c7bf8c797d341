"""A host to deploy to, made of directories and small programs."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest_nixvm.deploy

SCRIPT = Path(pytest_nixvm.deploy.__file__).with_name("remote.sh")

PROGRAMS = {
    # The unit: its main process, and what follows it however that ended.
    "systemd-run": r"""
post= argv=()
while (($#)); do
  case $1 in
    -p) case $2 in ExecStopPost=*) post=${2#*=} ;; esac; shift 2 ;;
    --*) shift ;;
    *) argv=("$@"); break ;;
  esac
done
setsid bash -c '
  touch "$R/active"; post=$1; shift
  "$@" > "$R/journal" 2>&1 & echo $! > "$R/pid"; wait $!
  $post >> "$R/journal" 2>&1; rm "$R/active"; touch "$R/ended"' unit "$post" "${argv[@]}" \
  < /dev/null > /dev/null 2>&1 &
until [ -s "$R/pid" ]; do sleep 0.02; done
""",
    "systemctl": r"""
case $1 in
  is-active) [ -e "$R/reexec" ] || { [ -e "$R/active" ] && echo active || echo inactive; } ;;
  is-system-running) if [ -e "$R/stopping" ]; then echo stopping; else echo running; fi ;;
  list-units)
    [ ! -e "$R/silent" ] || exit 1
    [ ! -e "$R/restarts" ] || sed 's/$/ loaded activating auto-restart it/' "$R/restarts"
    [ ! -e "$R/failed" ] || sed 's/$/ loaded failed failed it/' "$R/failed" ;;
  show) case ${*: -1} in well*) echo 0 ;; *) echo 1 ;; esac ;;
esac
""",
    "nix-env": r"""
echo "nix-env $*" >> "$R/log"
[ ! -e "$R/no-nix-env" ] || exit 1
profile=$2 number=2
while [ -L "$profile-$number-link" ] && [ "$(readlink "$profile-$number-link")" != "$4" ]; do
  number=$((number + 1))
done
ln -sfn "$4" "$profile-$number-link"; ln -sfn "system-$number-link" "$profile"
""",
    "nix-store": r"""
if [ "$1 $2" = "--check-validity --print-invalid" ]; then
  shift 2
  [ ! -e "$R/lacks" ] || printf '%s\n' "$@" | grep -e "$(cat "$R/lacks")"
  exit 0
fi
hash=$(printf 1%.0s {1..32})
for name in a-1.0 b-2.0 gone-3.1; do echo "/nix/store/$hash-$name"; done
""",
    "id": 'if [ -e "$R/uid" ]; then cat "$R/uid"; else echo 0; fi',
    "ssh": r"""
echo "ssh $*" >> "$R/ssh"
while (($#)); do
  case $1 in -o | -p) shift 2 ;; -*) shift ;; *) break ;; esac
done
shift
if [ -e "$R/unreachable" ]; then echo "ssh: connect to host: Connection timed out" >&2; exit 255; fi
exec bash -c "$*"
""",
}

SWITCH = r"""
me=$(dirname "$(dirname "$(readlink -f "$0")")")
echo "$(basename "$me") $1" >> "$R/log"
[ ! -e "$R/$(basename "$me").$1" ] || . "$R/$(basename "$me").$1"
[ "$1" != test ] || ln -sfn "$me" "$R/run/current-system"
[ "$1" != boot ] || basename "$me" > "$R/boot"
"""


class Host:
    def __init__(self, root):
        self.root = root
        self.env = {
            **os.environ,
            "R": str(root),
            "NIXVM_DEPLOY_ROOT": str(root),
            "PATH": f"{root}/bin:{os.environ['PATH']}",
        }
        for name in (
            "bin",
            "run",
            "etc",
            "nix/store",
            "nix/var/nix/profiles",
            "nix/var/nix/gcroots",
        ):
            (root / name).mkdir(parents=True)
        (root / "etc/NIXOS").write_text("")
        for name, text in PROGRAMS.items():
            self.program(root / "bin" / name, text)
        for name in ("old", "new"):
            (root / "nix/store" / name / "bin").mkdir(parents=True)
            self.program(root / "nix/store" / name / "bin/switch-to-configuration", SWITCH)
        self.script = f"{root}/run/nixvm-deploy.sh"
        self.old, self.new = (str(root / "nix/store" / name) for name in ("old", "new"))
        (root / "run/current-system").symlink_to(self.old)
        (root / "nix/var/nix/profiles/system-1-link").symlink_to(self.old)
        (root / "nix/var/nix/profiles/system").symlink_to("system-1-link")
        (root / "boot").write_text("old\n")
        (root / "log").write_text("")

    def program(self, path, text):
        path.write_text(f"#!{shutil.which('bash')}\n{text}")
        path.chmod(0o755)

    def behave(self, what, text):
        (self.root / what).write_text(text)

    def call(self, *words):
        argv = ["bash", str(SCRIPT), *words]
        return subprocess.run(argv, env=self.env, capture_output=True, text=True, timeout=30)

    def start(self, mode="test", activate=20, confirm=20, reason="", deploy=""):
        return self.call("start", mode, self.new, str(activate), str(confirm), reason, deploy)

    def until(self, *states):
        end = time.monotonic() + 20
        while (state := self.state()) not in states:
            assert time.monotonic() < end, (state, self.journal())
            time.sleep(0.05)
        return state

    def stop(self):
        """End what is under way, whose ever it is."""
        if (self.root / "active").exists():
            self.call("abort", "the test is over", self.facts()["id"])
            self.ended()

    def ended(self, timeout=20):
        end = time.monotonic() + timeout
        while not (self.root / "ended").exists():
            assert time.monotonic() < end, self.journal()
            time.sleep(0.05)
        return self.state()

    def state(self):
        file = self.root / "run/nixvm-deploy/state"
        return file.read_text().strip() if file.exists() else ""

    def journal(self):
        return (self.root / "journal").read_text()

    def facts(self):
        lines = self.call("status").stdout.splitlines()
        return dict(line.split("=", 1) for line in lines)

    def log(self):
        return (self.root / "log").read_text().splitlines()

    def runs(self):
        """What runs, what boots next, and what the profile names."""
        running = (self.root / "run/current-system").resolve().name
        profile = (self.root / "nix/var/nix/profiles/system").resolve().name
        return running, (self.root / "boot").read_text().strip(), profile

    def kill(self):
        os.kill(int((self.root / "pid").read_text()), signal.SIGKILL)

    @property
    def rooted(self):
        return sorted(path.name for path in (self.root / "nix/var/nix/gcroots").iterdir())
