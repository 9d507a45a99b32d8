"""Measure proxy.py beside its peers (see README.md), and write the table to RESULTS.md.

    uv run bench/run.py             six minutes; --quick prints a rough table in one

Contestants run on one core, the load driver and the fake upstream on another, everything on
loopback. README.md beside this file says what each figure means. Linux only: it reads /proc and the
driver uses epoll. Exit code 1 means that a check failed: the figures are not to be trusted.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import importlib.metadata
import itertools
import json
import os
import platform
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BUILD = HERE / ".build"  # compiled programs and node_modules; ignored by git
RESULTS = HERE / "RESULTS.md"
PROXY = HERE.parent / "proxy.py"

# ---- What proxy.py is given ----
# Everything that is on by default stays on: limits, budget, ledger, metrics, a JSON log line per
# request; client keys are added. Only the limits are out of reach and the price is next to nothing,
# so that neither they nor the default budget turn a request away.

CALLERS = 8  # the driver rotates through as many keys
KEY = "bench-caller-{}-0123456789abcdef0123456789abcdef"

PROXY_CONFIG = """
[server]
cors_origins = ["http://localhost:3000"]

[providers.anthropic]
base_url = "http://127.0.0.1:{upstream_port}"

[prices."claude-mock-*"]
input = 0.001
output = 0.001

[limits]
requests_per_minute = 100000000
burst = 10000000
tokens_per_minute = 1000000000000
concurrent = 5000
concurrent_total = 5000

[ledger]
path = "{folder}/ledger-{port}.sqlite3"
{clients}
"""

NGINX_CONFIG = """
daemon off;
worker_processes 1;
worker_rlimit_nofile {files};
pid {folder}/nginx.pid;
error_log {folder}/nginx-error.log;
events {{ worker_connections {files}; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    keepalive_requests 1000000000;
    upstream vendor {{
        server 127.0.0.1:{upstream_port};
        keepalive 1024;
        keepalive_requests 1000000000;
    }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location = /health {{ return 200 "ok"; }}
        location = /api/anthropic {{
            proxy_pass http://vendor/v1/messages;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
        }}
    }}
}}
"""

# What a token looks like on the wire: in the browser's frames, and in the vendor's events.
FRAME_TOKEN = '"token":"'
VENDOR_TOKEN = '"text":"'
JSON_ANSWER = "How can I help"


class Failure(Exception):
    """The measurement cannot go on, or its figures would not mean what the table says."""


# ---- Contestants ----


@dataclass
class Contestant:
    """A program under load. `process` leads a session, which is how its tree is found."""

    name: str
    needle: str
    path: str
    port: int
    process: subprocess.Popen[bytes]
    log: Path
    start_seconds: float = 0.0


@dataclass
class Place:
    """Where this run's programs find each other, and which cores they may use."""

    folder: Path
    proxy: Path
    upstream_port: int
    contestant_cores: set[int]
    load_cores: set[int]
    redis_port: int | None = None


Command = Callable[[Place, int], tuple[list[str], dict[str, str]]]


def free_port() -> int:
    """Ask the kernel for one: fixed ports collide with whatever else runs on the machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(**extra: str) -> dict[str, str]:
    """No variable of the caller's shell may configure a contestant (PORT, REDIS_URL …)."""
    kept = ("PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR", "VIRTUAL_ENV")
    return {name: os.environ[name] for name in kept if name in os.environ} | extra


def proxy_command(place: Place, port: int) -> tuple[list[str], dict[str, str]]:
    if not place.proxy.exists():
        raise Failure("there is no proxy.py")
    clients = "".join(
        f'\n[clients.caller{number}]\nkey_sha256 = "{hashlib.sha256(key.encode()).hexdigest()}"\n'
        for number, key in ((number, KEY.format(number)) for number in range(CALLERS))
    )
    config = place.folder / f"config-{port}.toml"  # it runs twice, see CONTESTANTS
    config.write_text(
        PROXY_CONFIG.format(
            upstream_port=place.upstream_port, folder=place.folder, port=port, clients=clients
        )
    )
    command = [sys.executable, str(place.proxy), "--config", str(config), "--port", str(port)]
    return command, environment(ANTHROPIC_API_KEY="sk-ant-bench-not-a-real-key")


def redis_command(place: Place, port: int) -> tuple[list[str], dict[str, str]]:
    """The same, as one of several replicas would run: Redis is asked before and after a request."""
    if place.redis_port is None:
        raise Failure("redis-server is not installed")
    command, env = proxy_command(place, port)
    return command, env | {"REDIS_URL": f"redis://127.0.0.1:{place.redis_port}"}


def workers_command(number: int) -> Command:
    def command(place: Place, port: int) -> tuple[list[str], dict[str, str]]:
        argv, env = redis_command(place, port)
        return [*argv, "--workers", str(number)], env

    return command


def express_command(place: Place, port: int) -> tuple[list[str], dict[str, str]]:
    folder = install_express()
    return ["node", str(folder / "server.js")], environment(
        ANTHROPIC_API_KEY="sk-ant-bench-not-a-real-key",
        ANTHROPIC_BASE_URL=f"http://127.0.0.1:{place.upstream_port}",
        PORT=str(port),
        NODE_ENV="production",
    )


def floor_command(place: Place, port: int) -> tuple[list[str], dict[str, str]]:
    program = str(HERE / "floor.py")
    return [sys.executable, program, str(port), str(place.upstream_port)], environment()


def nginx_command(place: Place, port: int) -> tuple[list[str], dict[str, str]]:
    nginx = find_nginx()
    if nginx is None:
        raise Failure("nginx is not installed")
    config = place.folder / "nginx.conf"
    config.write_text(
        NGINX_CONFIG.format(
            upstream_port=place.upstream_port,
            folder=place.folder,
            port=port,
            files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        )
    )
    error_log = str(place.folder / "nginx-error.log")
    return [nginx, "-p", str(place.folder), "-c", str(config), "-e", error_log], environment()


BROWSER_PATH = "/api/anthropic"
CONTESTANTS: dict[str, tuple[Command, str, str]] = {
    "proxy.py": (proxy_command, FRAME_TOKEN, BROWSER_PATH),
    "pass-through": (proxy_command, VENDOR_TOKEN, "/v1/messages"),
    "Redis": (redis_command, FRAME_TOKEN, BROWSER_PATH),
    "Express": (express_command, FRAME_TOKEN, BROWSER_PATH),
    "floor": (floor_command, VENDOR_TOKEN, BROWSER_PATH),
    "nginx": (nginx_command, VENDOR_TOKEN, BROWSER_PATH),
}  # in the order of the table's columns
TITLES = {
    "pass-through": "proxy.py, /v1/messages",
    "Redis": "proxy.py with Redis",
    "floor": "bare Granian + aiohttp (floor)",
}
COSTS = ("paced", "burst", "one", "json")  # the loads whose figure is CPU
# of some contestants not every load is worth its time
ONLY = {"pass-through": COSTS, "Redis": (*COSTS, "single")}
WORKERS = (1, 2, 4)


def find_nginx() -> str | None:
    """Debian puts it where only root's PATH looks."""
    return shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")


def install_express() -> Path:
    """Install the peer's packages outside the tracked folder; again only when it has changed."""
    for tool in ("node", "npm"):
        if shutil.which(tool) is None:
            raise Failure(f"{tool} is not installed")
    source, folder = HERE / "express", BUILD / "express"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(source / "server.js", folder)
    wanted, installed = (source / "package.json").read_text(), folder / "installed.json"
    if not installed.exists() or installed.read_text() != wanted:
        shutil.copy(source / "package.json", folder)
        options = ["--omit=dev", "--no-audit", "--no-fund", "--no-package-lock", "--ignore-scripts"]
        try:
            done = subprocess.run(
                ["npm", "install", *options], cwd=folder, capture_output=True, timeout=180
            )
        except subprocess.TimeoutExpired:
            raise Failure("npm install took longer than 180 s") from None
        if done.returncode:
            raise Failure("npm install failed: " + tail(done.stderr.decode(errors="replace"), 3))
        installed.write_text(wanted)
    return folder


def build(name: str) -> Path:
    """Compile one of the two C programs, unless it is newer than its source."""
    source, binary = HERE / f"{name}.c", BUILD / name
    BUILD.mkdir(exist_ok=True)
    if not binary.exists() or binary.stat().st_mtime < source.stat().st_mtime:
        compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        if compiler is None:
            raise Failure(f"a C compiler is needed to build {source.name}")
        subprocess.run([compiler, "-O2", "-o", str(binary), str(source)], check=True, timeout=120)
    return binary


def tail(text: str, lines: int = 15) -> str:
    return "\n".join(text.strip().splitlines()[-lines:])


# ---- Processes ----


def spawn(
    command: list[str], cores: set[int], log: Path, env: dict[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start a program in a session of its own and bound to `cores`, with its output in `log`."""
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            cwd=log.parent,
            env=environment() if env is None else env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )


def stop(process: subprocess.Popen[Any]) -> None:
    """End a process and what it has started: the session we gave it, and nothing else."""
    for number, patience in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue


def tree(process: subprocess.Popen[bytes]) -> Iterator[Path]:
    """The /proc folders of every process in the session that `process` leads."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it ended while we looked
                continue
            if int(fields[3]) == process.pid:
                yield folder


def cpu_seconds(process: subprocess.Popen[bytes]) -> float:
    """User and system time of the whole tree."""
    ticks = 0
    for folder in tree(process):
        fields = (folder / "stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def pss_kib(process: subprocess.Popen[bytes]) -> int:
    """Proportional memory of the whole tree: what it shares is divided by those who share it."""
    total = 0
    for folder in tree(process):
        for line in (folder / "smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1])
    return total


def start(name: str, place: Place) -> Contestant:
    """Start a contestant and wait for its first answer: a streamed token, not only /health."""
    command, needle, path = CONTESTANTS[name]
    port = free_port()
    argv, env = command(place, port)
    log = place.folder / f"{name}.log"
    begin = time.monotonic()
    process = spawn(argv, place.contestant_cores, log, env)
    contestant = Contestant(name, needle, path, port, process, log)
    try:
        while not healthy(port):
            if process.poll() is not None or time.monotonic() - begin > 20:
                raise Failure(f"{name} did not start:\n{tail(log.read_text(errors='replace'))}")
            time.sleep(0.005)
        first_answer(contestant)
    except BaseException:
        stop(process)
        raise
    contestant.start_seconds = time.monotonic() - begin
    return contestant


def healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def first_answer(contestant: Contestant) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", contestant.port, timeout=10)
    headers = {name: value.replace("%k", "0") for name, value in HEADERS.items()}
    connection.request("POST", contestant.path, body("one"), headers)
    response = connection.getresponse()
    answer = response.read().decode(errors="replace")
    connection.close()
    if response.status != 200 or contestant.needle not in answer:
        log = tail(contestant.log.read_text(errors="replace"))
        raise Failure(f"{contestant.name} answered {response.status}: {answer[:400]}\n{log}")


# ---- Load ----

HEADERS = {
    "Content-Type": "application/json",
    "Origin": "http://localhost:3000",
    "Authorization": "Bearer " + KEY.format("%k"),
}


RUNS = itertools.count()


def body(mode: str, stream: bool = True) -> str:
    """A request that is different each time: the driver puts its number where %d stands."""
    question = f"Question {next(RUNS)}-%d: what is a quick brown fox?"
    return json.dumps(
        {
            "model": f"claude-mock-{mode}",
            "max_tokens": 1024,
            "stream": stream,
            "messages": [{"role": "user", "content": question}],
        }
    )


@dataclass(frozen=True)
class Load:
    """One kind of load. `tokens` are expected in each answer, neither more nor fewer."""

    mode: str
    tokens: int
    streams: int = 8
    seconds: float = 3.0
    requests: int | None = None
    ramp_ms: int = 0
    stream: bool = True
    one_write_per_token: bool = False
    memory: bool = False


@dataclass
class Sample:
    """What one run of one load has shown."""

    driver: dict[str, Any]
    cpu_seconds: float
    kib_per_stream: float | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def microseconds_per_request(self) -> float:
        return 1e6 * self.cpu_seconds / max(1, int(self.driver["finished"]))

    @property
    def microseconds_per_token(self) -> float:
        return 1e6 * self.cpu_seconds / max(1, int(self.driver["tokens"]))


def apply_load(load: Load, contestant: Contestant, place: Place) -> Sample:
    """Run the driver against a contestant once, and read what that has cost."""
    command = [str(build("drv")), "-p", str(contestant.port), "-P", contestant.path]
    command += ["-c", str(load.streams), "-d", str(load.seconds), "-R", str(load.ramp_ms)]
    command += ["-b", body(load.mode, load.stream), "-T", "30"]
    command += ["-k", contestant.needle if load.stream else JSON_ANSWER]
    for name, value in HEADERS.items():
        command += ["-H", f"{name}: {value}"]
    if load.requests is not None:
        command += ["-n", str(load.requests)]
    memory_before = pss_kib(contestant.process) if load.memory else 0
    cpu_before = cpu_seconds(contestant.process)
    driver = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: os.sched_setaffinity(0, place.load_cores),
    )
    memory, lines = 0, []
    try:
        assert driver.stdout is not None
        for line in driver.stdout:  # ends by itself: the driver's -d and -T bound it
            lines.append(line)
            if line == "open\n" and load.memory:
                for _ in range(3):
                    memory = max(memory, pss_kib(contestant.process))
                    time.sleep(0.2)
        driver.wait(10)
    finally:
        stop(driver)
    time.sleep(0.1)  # what follows the last byte (settling, ledger, log) belongs to the request
    sample = Sample(json.loads(lines[-1]), cpu_seconds(contestant.process) - cpu_before)
    if memory:
        sample.kib_per_stream = (memory - memory_before) / load.streams
    sample.problems = check(load, sample.driver)
    return sample


def check(load: Load, driver: dict[str, Any]) -> list[str]:
    """Why these figures would not mean what the table says."""
    problems = []
    if driver["errors"] or driver["bad_status"] or driver["finished"] != driver["started"]:
        counts = {name: driver[name] for name in ("started", "finished", "errors", "bad_status")}
        problems.append(f"not every request was answered: {counts} {driver['first_error']}")
    fewest, most = driver["fewest_tokens"], driver["most_tokens"]
    if load.stream and not fewest == most == load.tokens:
        problems.append(f"{fewest} to {most} tokens in an answer of {load.tokens}")
    if not load.stream and fewest < 1:
        problems.append("a JSON reply lacks the answer")
    if load.one_write_per_token and driver["writes"] != driver["tokens"]:
        problems.append(f"{driver['tokens']} tokens in {driver['writes']} writes")
    return problems


ATTEMPTS = 3


def measure(load: Load, contestant: Contestant, place: Place) -> Sample:
    """Apply a load until its checks hold, three times at most.

    On a busy machine a contestant may lose its core for longer than a token's period, and then
    finds two tokens to write at once. A fault of the contestant's own repeats itself.
    """
    for attempt in range(1, ATTEMPTS + 1):
        sample = apply_load(load, contestant, place)
        if not sample.problems:
            return sample
        print(f"    {contestant.name}, {load.mode}, attempt {attempt}: {sample.problems[0]}")
    return sample


# ---- One round ----

Figures = dict[str, float]


def loads(quick: bool, many: int) -> dict[str, Load]:
    """The loads in the order they run: memory first, while the process is as it started."""
    some, singles = (100, 100) if quick else (200, 400)
    seconds, paced, open_for = (1.0, 60, 12) if quick else (3.0, 200, 25)
    return {
        "many": Load(f"paced-20x{open_for}", open_for, many, 20, many, ramp_ms=1000, memory=True),
        "some": Load("paced-20x10", 10, some, 20, some, ramp_ms=500 if quick else 1000),
        "single": Load("one", 1, streams=1, seconds=20, requests=singles),
        "paced": Load(
            f"paced-2x{paced}", paced, 100, 20, 100, ramp_ms=200, one_write_per_token=True
        ),
        "burst": Load("burst", 200, seconds=seconds),
        "one": Load("one", 1, seconds=seconds),
        "json": Load("json", 1, seconds=seconds, stream=False),
    }


def warm_up(contestant: Contestant, place: Place) -> None:
    """Let lazy imports and compilers do their work before anything is measured."""
    for load in (
        Load("burst", 200, seconds=0.5),
        Load("one", 1, seconds=0.5),
        Load("json", 1, seconds=0.5, stream=False),
    ):
        problems = apply_load(load, contestant, place).problems
        if problems:
            log = tail(contestant.log.read_text(errors="replace"))
            raise Failure(f"{contestant.name}, {load.mode}: {problems[0]}\n{log}")


def figures_of(kind: str, sample: Sample) -> Figures:
    if kind not in COSTS:
        figures = {
            f"{kind} p50": sample.driver["ttft_ms_p50"],
            f"{kind} p99": sample.driver["ttft_ms_p99"],
        }
        if sample.kib_per_stream is not None:
            figures["stream KiB"] = sample.kib_per_stream
        return figures
    if kind in ("paced", "burst"):
        return {kind: sample.microseconds_per_token}
    return {kind: sample.microseconds_per_request}


def run_round(
    names: list[str], place: Place, wanted: dict[str, Load], problems: list[str]
) -> dict[str, Figures]:
    """All contestants are up together and take turns at each load, so that noise hits all alike."""
    figures: dict[str, Figures] = {}
    with ExitStack() as stack:
        contestants = []
        for name in names:
            contestant = start(name, place)
            stack.callback(stop, contestant.process)
            warm_up(contestant, place)
            contestants.append(contestant)
            figures[name] = {"start": contestant.start_seconds}
        time.sleep(0.5)
        for contestant in contestants:
            figures[contestant.name]["idle MB"] = pss_kib(contestant.process) * 1024 / 1e6
        for kind, load in wanted.items():
            for contestant in contestants:
                if kind not in ONLY.get(contestant.name, wanted):
                    continue
                sample = measure(load, contestant, place)
                problems += [f"{contestant.name}, {kind}: {what}" for what in sample.problems]
                figures[contestant.name] |= figures_of(kind, sample)
    return figures


def run_workers(place: Place, rounds: int) -> dict[int, tuple[float, float]]:
    """Requests and tokens a second by number of workers: medians. The contestant, Redis, the driver
    and the vendor share all cores here, as they would on a small machine."""
    everywhere = replace(place, contestant_cores=place.contestant_cores | place.load_cores)
    found: dict[int, list[tuple[float, float]]] = {number: [] for number in WORKERS}
    for _, number in itertools.product(range(rounds), WORKERS):
        name = f"{number} workers"
        CONTESTANTS[name] = (workers_command(number), FRAME_TOKEN, BROWSER_PATH)
        try:
            contestant = start(name, everywhere)
        finally:
            del CONTESTANTS[name]
        try:
            warm_up(contestant, everywhere)
            rates = []
            for load in (Load("one", 1, 64, 3.0), Load("burst", 200, 64, 3.0)):
                begin = time.monotonic()
                sample = measure(load, contestant, everywhere)
                seconds = time.monotonic() - begin
                if sample.problems:
                    raise Failure(f"{name}, {load.mode}: {sample.problems[0]}")
                rates.append(sample.driver["tokens"] / seconds)
            found[number].append((rates[0], rates[1]))
        finally:
            stop(contestant.process)
    return {
        number: (statistics.median(a), statistics.median(b))
        for number, (a, b) in ((n, tuple(zip(*rates, strict=True))) for n, rates in found.items())
    }


# ---- The table ----


@dataclass(frozen=True)
class Row:
    """A line of the table. An aim is a limit for proxy.py, as a figure or as a ratio to Express."""

    key: str
    label: str
    aim: float | None = None
    aim_is_ratio: bool = False


def rows(some: int, many: int) -> list[Row]:
    return [
        Row("paced", "paced token, 100 streams, CPU µs", 0.65, aim_is_ratio=True),
        Row("burst", "burst token, CPU µs"),
        Row("one", "1-token stream, CPU µs a request", 0.40, aim_is_ratio=True),
        Row("json", "JSON reply, CPU µs a request"),
        Row("single p50", "first token, 1 stream, p50 ms"),
        Row("single p99", "first token, 1 stream, p99 ms"),
        Row("some p50", f"first token, {some} streams, p50 ms"),
        Row("some p99", f"first token, {some} streams, p99 ms"),
        Row("many p50", f"first token, {many:,} streams, p50 ms"),
        Row("many p99", f"first token, {many:,} streams, p99 ms"),
        Row("stream KiB", f"memory a stream (PSS, {many:,} open), KiB", 40),
        Row("idle MB", "memory idle (PSS), MB", 120),
        Row("start", "start to first answer, s", 1.5),
    ]


def show(number: float | None) -> str:
    """Three significant digits are more than a shared machine can promise."""
    if number is None:
        return "–"
    if 0 < number < 0.005:
        return "< 0.01"
    digits = 0 if abs(number) >= 100 else 1 if abs(number) >= 10 else 2
    return f"{number:,.{digits}f}"


def median_of(rounds: list[dict[str, Figures]], name: str, key: str) -> float | None:
    numbers = [figures[name][key] for figures in rounds if key in figures.get(name, {})]
    return statistics.median(numbers) if numbers else None


def ratio_to(rounds: list[dict[str, Figures]], peer: str, key: str) -> float | None:
    """The median of each round's ratio, not the ratio of medians: a slow round is slow for both."""
    ratios = [
        figures["proxy.py"][key] / figures[peer][key]
        for figures in rounds
        if "proxy.py" in figures and figures.get(peer, {}).get(key, 0) > 0
    ]
    return statistics.median(ratios) if ratios else None


def verdict(row: Row, own: float | None, ratio: float | None) -> tuple[str, str]:
    if row.aim is None:
        return "", ""
    value = ratio if row.aim_is_ratio else own
    aim = f"≤ {row.aim:g}" + (" × Express" if row.aim_is_ratio else "")
    return aim, "–" if value is None else "yes" if value <= row.aim else "**no**"


def make_table(rounds: list[dict[str, Figures]], table_rows: list[Row]) -> str:
    titles = [TITLES.get(name, name) for name in CONTESTANTS]
    peers = [name for name in CONTESTANTS if name != "proxy.py"]
    header = ["", *titles, *(f"to {peer}" for peer in peers), "aim", "met"]
    lines = [header, ["---"] + ["---:"] * (len(titles) + len(peers)) + ["---", "---"]]
    for row in table_rows:
        own, *others = (median_of(rounds, name, row.key) for name in CONTESTANTS)
        ratios = [ratio_to(rounds, peer, row.key) for peer in peers]
        aim, met = verdict(row, own, ratios[peers.index("Express")])
        lines.append([row.label, *map(show, [own, *others, *ratios]), aim, met])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def pass_through_line(rounds: list[dict[str, Figures]]) -> list[str]:
    """What the vendor's own bytes cost beside the browser's frames; it must not be more."""
    ratios = {key: ratio_to(rounds, "pass-through", key) for key in ("paced", "burst")}
    if None in ratios.values():
        return []
    parts = [f"{show(1 / ratio)} for a {key} token" for key, ratio in ratios.items() if ratio]
    met = "yes" if all(ratio and ratio >= 1 for ratio in ratios.values()) else "**no**"
    title = f"`/v1/messages` (bytes passed on) divided by `{BROWSER_PATH}` (frames)"
    return [f"{title}: {', '.join(parts)}; aim ≤ 1; met: {met}.", ""]


def redis_lines(rounds: list[dict[str, Figures]]) -> list[str]:
    """What a request and a token cost more with Redis, as ratios and in microseconds of CPU."""
    parts = []
    for key, what in (("one", "a 1-token stream"), ("json", "a JSON reply"), ("paced", "a token")):
        ratio = ratio_to(rounds, "Redis", key)
        own, other = median_of(rounds, "proxy.py", key), median_of(rounds, "Redis", key)
        if ratio and own is not None and other is not None:
            parts.append(f"{what} {show(1 / ratio)} ({show(other - own)} µs more)")
    if not parts:
        return []
    return [f"With Redis divided by without, Redis's own CPU left out: {', '.join(parts)}.", ""]


def workers_lines(found: dict[int, tuple[float, float]]) -> list[str]:
    if not found:
        return []
    lines = [
        f"Throughput with Redis, 64 at a time, on all {os.cpu_count()} cores, which the workers",
        "share with the load driver, the fake vendor and Redis:",
        "",
        "| workers | 1-token streams a second | to one worker | burst tokens a second | to one |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]
    first = found[min(found)]
    for number, (requests, tokens) in found.items():
        cells = [str(number), show(requests), show(requests / first[0])]
        cells += [show(tokens), show(tokens / first[1])]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def version_of(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    return (done.stdout + done.stderr).strip().rpartition("/")[2].lstrip("v")


def describe_machine(names: list[str]) -> list[str]:
    """Enough to compare two tables, and nothing that identifies a machine."""
    model = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    parts = [f"{os.cpu_count()} cores ({model}, {platform.system()})"]
    packages = ("litestar", "granian", "httpx", "httpx-aiohttp", "aiohttp", "uvloop")
    versions = []
    for package in packages:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    parts.append(f"Python {platform.python_version()} ({', '.join(versions)})")
    if "Express" in names:
        wanted = json.loads((HERE / "express" / "package.json").read_text())["dependencies"]
        peers = ", ".join(f"{package} {wanted[package]}" for package in sorted(wanted))
        parts.append(f"Node {version_of(['node', '--version'])} ({peers})")
    if "nginx" in names:
        parts.append(f"nginx {version_of([find_nginx() or 'nginx', '-v'])}")
    return parts


def make_report(
    options: argparse.Namespace,
    names: list[str],
    skipped: list[str],
    problems: list[str],
    table: str,
    more: list[str],
) -> str:
    command = "uv run bench/run.py" + (" --quick" if options.quick else "")
    rounds = "one round" if options.rounds == 1 else f"medians of {options.rounds} rounds"
    lines = [
        "# Measured",
        "",
        f"Written by `{command}`, {rounds}; `README.md` says what each line means.",
        "Ratios: proxy.py's figure divided by the peer's in the same round; below 1 is better.",
        "",
        *(f"* {part}" for part in describe_machine(names)),
        *(f"* skipped: {reason}" for reason in skipped),
        "",
        table,
        "",
        *more,
    ]
    if problems:
        lines += ["**Checks that failed; do not trust these figures:**", ""]
        lines += [f"* {problem}" for problem in problems] + [""]
    return "\n".join(lines)


# ---- Main ----


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, help="take medians of this many (3; 1 if --quick)")
    parser.add_argument(
        "--quick", action="store_true", help="one short round, to see that it works"
    )
    parser.add_argument(
        "--streams", type=int, help="the most streams at once (1000; 300 if --quick)"
    )
    parser.add_argument(
        "--only",
        default=",".join(CONTESTANTS),
        help="contestants to run, separated by commas (%(default)s)",
    )
    parser.add_argument("--proxy", type=Path, default=PROXY, help="measure another proxy.py")
    parser.add_argument("--output", type=Path, help="where to write (RESULTS.md; none if --quick)")
    options = parser.parse_args()
    options.rounds = options.rounds or (1 if options.quick else 3)
    options.streams = options.streams or (300 if options.quick else 1000)
    if not options.output and not options.quick:
        options.output = RESULTS
    options.only = [name.strip() for name in options.only.split(",")]
    unknown = set(options.only) - set(CONTESTANTS)
    if unknown:
        parser.error(f"unknown contestant {', '.join(sorted(unknown))}")
    return options


def raise_file_limit() -> int:
    """A stream takes two descriptors in a proxy. What we may not raise is said by the table."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = hard if hard != resource.RLIM_INFINITY else 65536
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, 65536), hard))
    return min(wanted, 65536)


@contextmanager
def upstream(folder: Path, proxy: Path) -> Iterator[Place]:
    """The fake vendor, and the division of the cores: contestants on one, load on another."""
    cores = sorted(os.sched_getaffinity(0))
    contestant_cores = {cores[0]} if len(cores) > 1 else set(cores)
    load_cores = {cores[1]} if len(cores) > 1 else set(cores)
    os.sched_setaffinity(0, load_cores)
    port = free_port()
    process = spawn([str(build("mock")), str(port)], load_cores, folder / "mock.log")
    redis, redis_port = None, None
    if program := shutil.which("redis-server"):
        redis_port = free_port()
        argv = [program, "--port", str(redis_port), "--bind", "127.0.0.1", "--save", ""]
        redis = spawn([*argv, "--dir", str(folder)], load_cores, folder / "redis.log")
    try:
        time.sleep(0.2)
        if process.poll() is not None:
            raise Failure("the fake upstream did not start: " + (folder / "mock.log").read_text())
        yield Place(folder, proxy, port, contestant_cores, load_cores, redis_port)
    finally:
        stop(process)
        if redis:
            stop(redis)


def available(names: list[str], place: Place) -> tuple[list[str], list[str]]:
    """Who can run here, and why the others cannot."""
    ready, skipped = [], []
    for name in names:
        try:
            CONTESTANTS[name][0](place, free_port())
            ready.append(name)
        except Failure as reason:
            skipped.append(f"{name} ({reason})")
    return ready, skipped


def run(options: argparse.Namespace) -> int:
    many = min(options.streams, (raise_file_limit() - 300) // 2)
    wanted = loads(options.quick, many)
    for tool in ("mock", "drv"):
        build(tool)
    problems: list[str] = []
    rounds: list[dict[str, Figures]] = []
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as folder,
        upstream(Path(folder), options.proxy.resolve()) as place,
    ):
        names, skipped = available(options.only, place)
        for reason in skipped:
            print(f"skipped: {reason}")
        if not names:
            raise Failure("nothing to measure")
        for number in range(options.rounds):
            print(f"round {number + 1} of {options.rounds}", flush=True)
            order = names[number % len(names) :] + names[: number % len(names)]
            rounds.append(run_round(order, place, wanted, problems))
        workers = run_workers(place, options.rounds) if "Redis" in names else {}
    table = make_table(rounds, rows(wanted["some"].streams, many))
    more = pass_through_line(rounds) + redis_lines(rounds) + workers_lines(workers)
    report = make_report(options, names, skipped, problems, table, more)
    if options.output:
        options.output.write_text(report)
    print("\n" + report)
    return 1 if problems or ("proxy.py" in options.only and "proxy.py" not in names) else 0


def main() -> int:
    if platform.system() != "Linux":
        print("bench/run.py needs Linux: it reads /proc, and its load driver uses epoll")
        return 2
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # so that `finally` stops what we started
    options = read_options()
    try:
        return run(options)
    except Failure as failure:
        print(f"failed: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
