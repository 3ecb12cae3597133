"""Networks of a test's own: where they can be made, several machines can be played on this one."""

import os
import shutil
import subprocess

import pytest

TOOLS = ("ip", "unshare", "nsenter", "setpriv")
TRY = "ip link add switch type bridge && ip link add here type veth peer name there"


def _can_make_networks() -> bool:
    if os.geteuid() != 0 or None in map(shutil.which, TOOLS):
        return False
    apart = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork"]
    return subprocess.run([*apart, "sh", "-c", TRY], capture_output=True).returncode == 0


needs_networks = pytest.mark.skipif(
    not _can_make_networks(), reason=f"needs root, namespaces and the commands {', '.join(TOOLS)}"
)
"""For a test that plays another machine."""
