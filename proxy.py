#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "litestar>=2.25,<3",
#     "granian>=2.8.7,<3",
#     "httpx>=0.28.1,<0.29",
#     "httpx-aiohttp>=0.2,<0.3",
#     "aiohttp>=3.14,<4",
#     "msgspec>=0.22,<0.23",
#     "cachetools>=8,<9",
#     "prometheus-client>=0.26,<0.27",
#     "uvloop>=0.23,<0.24; sys_platform != 'win32'",
# ]
# ///
"""Let code in a browser call language models without seeing an API key.

    caller ─► origin, client ─► limits ─► cache / single flight ─► budget hold ─► adapter.encode
                                                                    (retry, fallback) │ upstream
    caller ◄─ writer (SDK frames | JSON | native) ◄─ events ◄─ adapter.decode ◄─ SSE ◄┘ bytes
                     │ at the end, however it ends
                     └─► metrics ─► one log line ─► settle the hold ─► ledger row

Run it with `uv run proxy.py --demo`; the README says the rest. Read it from top to bottom: each
section builds on those above it (but a body may name a template, which is the next section).
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import datetime
import email.utils
import fnmatch
import functools
import gc
import hashlib
import hmac
import html
import importlib
import io
import ipaddress
import itertools
import json
import logging
import math
import os
import re
import secrets
import signal
import socket
import sqlite3
import sys
import tempfile
import threading
import time
import tomllib
import weakref
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Iterator
from collections.abc import Mapping as Map
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol, get_args, get_origin, get_type_hints

import aiohttp
import cachetools
import httpx
import httpx_aiohttp
import litestar
import msgspec
import prometheus_client
from litestar.exceptions import HTTPException
from litestar.params import FromPath
from litestar.response.base import ASGIResponse
from litestar.types import ASGIApp, Receive, Scope, Send
from msgspec import Meta, Struct, field
from msgspec.structs import asdict, astuple, replace

__version__ = "0.1.0"

Headers = dict[str, str]  # lower-case names; repeated headers joined with ", "
Environ = Map[str, str]
Clock = Callable[[], float]
Transport = httpx.AsyncBaseTransport
Database = sqlite3.Connection

LOG = logging.getLogger("proxy")

# ---- Config ------------------------------------------------------------------------------------
# config.toml and the environment become one frozen Config. Nothing here opens a file except
# load_config; all that is read from the environment later on is keys, what shows a platform, and
# what the command line goes by.


class ConfigError(Exception):
    """A setting is wrong. The message names its key path and the fix."""


class Duration(float):
    """Seconds, written as "250ms", "25s", "10m", "1h" or "90d"."""


class Size(int):
    """Bytes, written as "64KiB", "8MiB" or "1GiB"."""


class Usd(Decimal):
    """US dollars, written as a number; "unlimited" is infinity."""


class Rate(Decimal):
    """US dollars for some tokens or for each use."""


class BaseUrl(str):
    """The URL that API paths are appended to."""


class Url(str):
    """An endpoint, or "" for none."""


class Origin(str):
    """A web origin, or "*" for any."""


class Digest(str):
    """The SHA-256 of a key."""


class Phrase(str):
    """Text that is not blank."""


UNLIMITED = Usd("Infinity")
UNITS = {
    "ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400,
    "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30,
}  # fmt: skip
NUMBER = r"\d{1,30}(\.\d{1,30})?(e[+-]?\d{1,2})?"
AMOUNT = r"(?=.*[1-9])(\d{1,30}(?:\.\d{1,30})?) ?"
URL = r"https?://(\[[\da-fA-F:]+\]|[\w.-]+)(:\d{1,5})?(/[^?#\s]*)?"
WILDCARD = re.compile(r"[*?\[]")  # of a pattern, as fnmatch has them
NO_KEY = hashlib.sha256(b"").hexdigest()  # an empty key's digest

# The pattern of each kind's values, and the error for text that does not match it.
KINDS: dict[type, tuple[str, str]] = {
    Duration: (AMOUNT + "(ms|s|m|h|d)", '{!r} is not a duration like "25s" or "10m"'),
    Size: (AMOUNT + "(B|KiB|MiB|GiB)", '{!r} is not a size like "64KiB" or "8MiB"'),
    Rate: (NUMBER, "{!r} is not an amount of USD like 0.5"),
    Usd: (f"{NUMBER}|unlimited",
          '{!r} is not an amount of USD like 0.5, nor "unlimited"'),
    BaseUrl: (rf"(?!.*/(messages|responses|chat/completions)/?$){URL}",
              'must look like "https://api.example.com/v1", without the path of a call, not {!r}'),
    Url: (rf"({URL}(\?.*)?)?", "{!r} is not an http(s) URL"),
    Origin: (r"(?!http://.*:80$|https://.*:443$)https?://([a-z0-9._-]+|\[[0-9a-f:]+\])(:\d+)?"
             r"|(?!https?:)[a-z][a-z0-9+.-]*://[^/?#\s*]+|\*",
             '{!r} must be as browsers send it, like "https://app.example.com": in lower case, '
             "without a path, a final slash or the usual port"),
    Digest: (f"(?!{NO_KEY})[0-9a-f]{{64}}", "must be the 64 hex digits that `printf %s KEY | "
             "sha256sum` prints for a key that is not empty; `proxy.py key NAME` makes one"),
    Phrase: (r"(?s).*\S.*", "must not be blank: write something, or take it out"),
}  # fmt: skip


Count = Annotated[int, Meta(ge=1)]
WhenAway = Annotated[str, Meta(pattern=r"^(local|closed)\Z")]


class Table(Struct, frozen=True, forbid_unknown_fields=True):
    """A table of config.toml: a misspelt key is an error, never a setting that does nothing."""


class Server(Table, frozen=True):
    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=1, le=65535)] = 8000
    workers: Count = 1
    cors_origins: tuple[Origin, ...] = ()
    trusted_proxies: Annotated[int, Meta(ge=0)] | None = None
    drain: Duration = Duration(25)
    ping: Duration = Duration(15)
    log_level: Annotated[str, Meta(pattern=r"^(debug|info|warning|error)\Z")] = "info"
    admin_token: str = ""
    page: bool = False
    paused: bool = False


class Provider(Table, frozen=True):
    """`allow` lists fields, tools, blocks and betas of native bodies that are otherwise refused. At
    most `max_concurrent` requests of all replicas run at once, and each process queues
    `queue_limit` more."""

    adapter: Annotated[str, Meta(pattern=r"^(messages|responses|chat)\Z")]
    base_url: BaseUrl
    key_env: str | tuple[str, ...] = ""
    organization: str = ""
    project: str = ""
    models: tuple[str, ...] = ("*",)
    default_model: str = ""
    allow: tuple[str, ...] = ()
    max_concurrent: Count | None = None
    queue_limit: Annotated[int, Meta(ge=0)] = 100
    queue_timeout: Duration = Duration(10)

    @property
    def key_vars(self) -> tuple[str, ...]:
        """The names in `key_env`."""
        names = (self.key_env,) if isinstance(self.key_env, str) else self.key_env
        return tuple(filter(None, names))


class Upstream(Table, frozen=True):
    connect: Duration = Duration(5)
    first_byte: Duration = Duration(25)
    idle: Duration = Duration(60)
    total: Duration = Duration(600)
    attempts: Count = 3


class Limits(Table, frozen=True):
    requests_per_minute: Annotated[float, Meta(gt=0, le=1e9)] = 20
    burst: Count = 10
    tokens_per_minute: Count = 100_000
    concurrent: Count = 4
    concurrent_total: Annotated[int, Meta(ge=1, le=100_000)] = 1000
    max_tokens: Count = 4096
    max_body: Size = Size(8 * 2**20)
    body_timeout: Duration = Duration(15)
    max_messages: Count = 1000
    max_characters: Count = 400_000
    allow_system: bool = True
    allow_tools: bool = True
    templates_only: bool = False
    system_prompt: str = ""
    denied: tuple[Phrase, ...] = ()


class BudgetTable(Table, frozen=True):
    """What may be spent in a UTC day or month. `client_per_day` None is 0.50 USD for a client known
    only by its address, and no cap for any other."""

    total_per_day: Usd = Usd(10)
    total_per_month: Usd = UNLIMITED
    client_per_day: Usd | None = None
    client_per_month: Usd = UNLIMITED
    group_per_day: Usd = UNLIMITED
    group_per_month: Usd = UNLIMITED
    webhook: Url = Url()
    webhook_secret: str = ""


class Model(Table, frozen=True):
    target: str
    fallback: tuple[str, ...] = ()


class Rates(Table, frozen=True):
    """USD per million tokens. A cache price that is not set is that of input; of a 1 h write, that
    of a 5 m write."""

    input: Rate = Rate(0)
    output: Rate = Rate(0)
    cache_read: Rate | None = None
    cache_write_5m: Rate | None = None
    cache_write_1h: Rate | None = None


class Above(Rates, frozen=True, kw_only=True):
    """Those of a request whose input is larger than `tokens`."""

    tokens: Count
    input: Rate
    output: Rate


class Price(Rates, frozen=True):
    """`above` applies to the whole of a large request. `per_use` prices a tool that runs at the
    vendor, in USD per use."""

    above: Above | None = None
    free: bool = False
    per_use: Rate | None = None


class LedgerTable(Table, frozen=True):
    path: str = "proxy.sqlite3"
    persistent: bool = False
    keep: Duration = Duration(90 * 86400)


class CacheTable(Table, frozen=True):
    enabled: bool = False
    ttl: Duration = Duration(3600)
    size: Size = Size(64 * 2**20)
    shared: bool = False


class RedisTable(Table, frozen=True):
    """State shared by all replicas. While Redis is down, each process enforces its share of the
    rates, 1 / (replicas * workers), or refuses everything ("closed"); and likewise for budgets."""

    url: str = ""
    namespace: str = "proxy"
    replicas: Count = 1
    limits_when_away: WhenAway = "local"
    budget_when_away: WhenAway = "closed"
    lease: Duration = Duration(30)  # of a process's requests, from its last heartbeat
    rows: Count = 100_000  # ledger rows kept in Redis


class KeyBudget(Table, frozen=True):
    per_day: Usd | None = None
    per_month: Usd | None = None


class Key(Table, frozen=True):
    """A static client key, known only by its SHA-256. `limits` overrides [limits]."""

    key_sha256: Digest
    group: str = ""
    models: tuple[str, ...] = ("*",)
    limits: Limits = Limits()
    budget: KeyBudget = KeyBudget()


class Jwt(Table, frozen=True):
    """Tokens of the app's own login: signed with a secret (HS256), or with keys that the issuer
    publishes (RS256, ES256, EdDSA)."""

    secret: str = ""
    jwks_url: Url = Url()
    issuer: str = ""
    audience: str = ""
    leeway: Duration = Duration(30)
    client_claim: Phrase = Phrase("sub")
    group_claim: str = ""
    models: tuple[str, ...] = ("*",)


class Session(Table, frozen=True):
    """Short-lived tokens of our own, for pages without a login. `budget` is USD a session."""

    secret: str = ""
    ttl: Duration = Duration(600)
    budget: Usd = Usd("0.05")
    models: tuple[str, ...] = ("*",)
    per_minute: Count = 6
    turnstile_secret: str = ""
    siteverify_url: Url = Url("https://challenges.cloudflare.com/turnstile/v0/siteverify")


class Variable(Table, frozen=True):
    """What a page may put into a template: `text`, a `line` without breaks, or a `number`."""

    kind: Annotated[str, Meta(pattern=r"^(text|line|number)\Z")] = "text"
    max_length: Count = 1000
    place: Annotated[str, Meta(pattern=r"^(user|system)\Z")] = field(default="user", name="in")


class Template(Table, frozen=True):
    """A request that the server's owner wrote. `{name}` in `prompt` and `system` is a variable."""

    model: str
    prompt: Phrase
    system: str = ""
    max_tokens: Count = 1024
    tools: tuple[dict[str, Any], ...] = ()
    variables: dict[str, Variable] = {}


class Config(Table, frozen=True):
    server: Server = Server()
    providers: dict[str, Provider] = {}
    upstream: Upstream = Upstream()
    limits: Limits = Limits()
    models: dict[str, Model] = {}
    prices: dict[str, Price] = {}
    ledger: LedgerTable = LedgerTable()
    cache: CacheTable = CacheTable()
    budget: BudgetTable = BudgetTable()
    clients: dict[str, Key] = {}
    jwt: Jwt | None = None
    session: Session | None = None
    redis: RedisTable = RedisTable()
    templates: dict[str, Template] = {}
    demo: bool = False  # --demo; a config file cannot set it


BUILT_IN_PROVIDERS: dict[str, dict[str, Any]] = {
    "anthropic": {"adapter": "messages", "base_url": "https://api.anthropic.com",
                  "key_env": "ANTHROPIC_API_KEY", "models": ["claude-*"]},
    "openai": {"adapter": "responses", "base_url": "https://api.openai.com/v1",
               "key_env": "OPENAI_API_KEY",
               "models": ["gpt-*", "o*", "chat-*", "text-embedding-*"]},
}  # fmt: skip

# Variables that are one setting each; read_environment has the others.
ENVIRONMENT = {
    "server.port": "PORT", "server.cors_origins": "CORS_ORIGIN", "server.log_level": "LOG_LEVEL",
    "server.admin_token": "ADMIN_TOKEN", "server.paused": "PROXY_PAUSED",
    "server.workers": "WEB_CONCURRENCY", "server.trusted_proxies": "TRUSTED_PROXIES",
    "ledger.path": "LEDGER_PATH",
    "providers.anthropic.base_url": "ANTHROPIC_BASE_URL",
    "providers.anthropic.default_model": "DEFAULT_ANTHROPIC_MODEL",
    "providers.openai.base_url": "OPENAI_BASE_URL",
    "providers.openai.default_model": "DEFAULT_OPENAI_MODEL",
    "limits.max_tokens": "MAX_TOKENS_LIMIT", "redis.url": "REDIS_URL",
    "redis.replicas": "PROXY_REPLICAS",
    "providers.anthropic.max_concurrent": "MAX_CONCURRENT_REQUESTS",
    "providers.openai.max_concurrent": "MAX_CONCURRENT_REQUESTS",
    "upstream.total": "API_TIMEOUT", "limits.burst": "RATE_LIMIT_MAX",
    "budget.webhook_secret": "BUDGET_WEBHOOK_SECRET", "jwt.secret": "JWT_SECRET",
    "session.secret": "SESSION_SECRET", "session.turnstile_secret": "TURNSTILE_SECRET_KEY",
}  # fmt: skip

# How many X-Forwarded-For values each PaaS appends, by the variable that reveals the PaaS.
PLATFORMS = {"DYNO": 1, "RENDER": 1, "RAILWAY_ENVIRONMENT": 1, "FLY_APP_NAME": 2}


def convert_text(kind: Any, value: Any) -> Any:
    """Parse a value of one of our kinds, from the file or the environment."""
    if isinstance(value, kind):
        return value
    pattern, wrong = KINDS[kind]
    match = re.fullmatch(pattern, str(value))
    if not match:
        raise ValueError(wrong.format(value))
    if kind in (Duration, Size):
        return kind(float(match[1]) * UNITS[match[2]])
    return UNLIMITED if kind is Usd and value == "unlimited" else kind(str(value))


def merge(base: Any, override: Any) -> Any:
    """`override` merged into `base`, table by table."""
    if not (isinstance(base, dict) and isinstance(override, dict)):
        return override
    return base | {name: merge(base.get(name), value) for name, value in override.items()}


def load_config(
    path: Path | None = None, environ: Environ = os.environ, **overrides: Any
) -> Config:
    """Settings from `path` (config.toml beside this file by default), then from the environment,
    then from `overrides` (`{"server.port": 9000}`). Raises ConfigError."""
    chosen = path or environ.get("PROXY_CONFIG")
    file = Path(chosen or Path(__file__).with_name("config.toml"))
    tables: dict[str, Any] = {}
    try:
        if chosen or file.is_file():
            tables = tomllib.loads(file.read_text("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        wrong = getattr(error, "strerror", None) or error
        raise ConfigError(f"{file}: {wrong}") from None
    if not chosen and tables and tables.keys().isdisjoint(Config.__struct_fields__):
        known = ", ".join(Config.__struct_fields__[:-1])
        LOG.warning("%s is ignored: it has none of our tables (%s)", file, known)
        tables = {}
    tables = {name: convert(table, dict[str, Any], name) for name, table in tables.items()}
    given = tables.get("providers", {})  # these go first
    tables["providers"] = merge(given, merge(BUILT_IN_PROVIDERS, given))
    alone = {"redis.url": "", "ledger.path": ""} if overrides.get("demo") else {}
    for key, value in (read_environment(environ) | alone | overrides).items():
        section, _, name = key.partition(".")
        if section in {"jwt", "session"} - tables.keys():
            continue  # a secret alone enables nothing
        client = name.partition(".")[0]
        if section == "clients" and key not in overrides and client in tables.get(section, {}):
            wanted = "ALLOWED_CLIENT_KEYS and PROXY_AUTH_TOKEN have one of that name; call it"
            raise ConfigError(f"clients.{client}: {wanted} something else")
        for name in reversed(key.split(".")):
            value = {name: value}
        tables = merge(tables, value)
    try:
        limits = asdict(convert(tables.get("limits", {}), Limits, "limits"))
        clients = tables.get("clients", {}).items()
        tables["clients"] = {name: merge({"limits": limits}, key) for name, key in clients}
        for section, kind in get_type_hints(Config).items():
            if get_origin(kind) is dict:  # one by one, so that errors name the entry
                each, entries = get_args(kind)[1], tables.get(section, {}).items()
                tables[section] = {n: convert(e, each, f"{section}.{n}") for n, e in entries}
        config: Config = convert(tables, Config, "")
        check_values(config)
    except ConfigError as error:
        key, _, message = str(error).partition(": ")
        variable = ENVIRONMENT.get(key, "")
        source = f" (from {variable})" if environ.get(variable) and key not in overrides else ""
        raise ConfigError(f"{key}{source}: {message}") from None
    return config


# What msgspec says, and what we say of a config or a body.
PLAIN_ERRORS = {
    r"Expected .*\^\((.*)\)\\\\Z'": r"must be one of \1", "Expected `int` >= 1": "must be above 0",
    r"Expected `\w+` ([<>].*)": r"must be \1", "Expected `bool.*, .*": "must be true or false",
    "Expected `(int|float).*, .*": "must be a number",
    "Expected `str.*, .*": "must be text, in quotes",
    "Expected `array.*, .*": "must be a list, in [ ]",
    "Input data was truncated": "ends too early, or is empty",
    "Expected `object.*, .*": "must be a table or object",
    "Object contains unknown field (.*)": r"has no setting \1",
    "Object missing required field (.*)": r"needs \1",
}  # fmt: skip


def plain_error(error: Exception) -> tuple[str, str]:
    """What msgspec finds wrong, and where."""
    message, _, where = str(error).partition(" - at `$")
    for theirs, plain in PLAIN_ERRORS.items():
        message = re.sub(theirs, plain, message)
    return message, where


def convert(value: Any, kind: Any, path: str) -> Any:
    try:
        return msgspec.convert(value, kind, strict=False, dec_hook=convert_text)
    except msgspec.ValidationError as error:
        message, where = plain_error(error)
        where = re.sub(r"\[.*?\]|`", "", where)  # [...] for an entry
        key = f"{path}{where}".strip(".") or "top level"
        raise ConfigError(f"{key}: {message}; the README lists every setting") from None


def read_environment(environ: Environ) -> dict[str, Any]:
    """The settings that variables hold, by their key paths."""
    found: dict[str, Any] = {k: environ.get(name, "").strip() for k, name in ENVIRONMENT.items()}
    for key, value in found.items():
        if value.encode(errors="replace").decode() != value:
            raise ConfigError(f"{ENVIRONMENT[key]}: is not UTF-8; set it anew")
    level = found["server.log_level"].lower()
    found["server.log_level"] = "warning" if level == "warn" else level
    found["server.cors_origins"] = split_list(found["server.cors_origins"])
    paused = found["server.paused"].lower()
    found["server.paused"] = {"yes": "1", "on": "1", "no": "0", "off": "0"}.get(paused, paused)
    if found["upstream.total"].isdecimal():
        found["upstream.total"] += "ms"
    try:
        if maximum := found["limits.burst"]:
            window = int(environ.get("RATE_LIMIT_WINDOW_MS") or 60_000)
            found["limits.requests_per_minute"] = int(maximum) * 60_000 / window
    except (ValueError, ZeroDivisionError):
        wanted = "each must be a whole number above 0"
        raise ConfigError(f"RATE_LIMIT_MAX, RATE_LIMIT_WINDOW_MS: {wanted}") from None
    token = environ.get("PROXY_AUTH_TOKEN", "").strip()  # one key: it may hold a comma
    keys = [*filter(None, [token]), *split_list(environ.get("ALLOWED_CLIENT_KEYS", ""))]
    if not all(map(str.isascii, keys)):
        raise ConfigError("ALLOWED_CLIENT_KEYS, PROXY_AUTH_TOKEN: a key must be ASCII, to be sent")
    for number, key in enumerate(dict.fromkeys(keys), start=1):
        found[f"clients.env-{number}.key_sha256"] = sha256(key)
    return {key: value for key, value in found.items() if value not in ("", [])}


def split_list(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


SLOT = re.compile(r"\{([A-Za-z_]\w*)\}")
SLOTS = re.compile(rf"(?:{SLOT.pattern}\s*)+")


def check_values(config: Config) -> None:
    """Checks that no single type can do. Raises ConfigError with the key path and the fix."""
    for name, provider in config.providers.items():
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):
            raise ConfigError(f"providers.{name}: use lower-case letters, digits, - and _")
        for variable in provider.key_vars:
            if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", variable):
                wanted = "must name, in capitals, the environment variable that holds the key"
                raise ConfigError(f"providers.{name}.key_env: {wanted}, and not be the key itself")
    for name, model in config.models.items():
        for target in (model.target, *model.fallback):
            if target.partition("/")[0] not in config.providers or not target.partition("/")[2]:
                wanted = f"provider/model with one of the providers {', '.join(config.providers)}"
                raise ConfigError(f"models.{name}: {target!r} must be {wanted}")
    digests: dict[str, str] = {}
    for name, key in config.clients.items():
        for setting in ("concurrent_total", "body_timeout"):
            if getattr(key.limits, setting) != getattr(config.limits, setting):
                wanted = "is the same for all; set it in [limits]"
                raise ConfigError(f"clients.{name}.limits.{setting}: {wanted}")
        if (other := digests.setdefault(key.key_sha256, name)) != name:
            whose = "; env-N are those of ALLOWED_CLIENT_KEYS" if name.startswith("env-") else ""
            raise ConfigError(f"clients.{name}.key_sha256: is that of clients.{other}, too{whose}")
    for pattern, price in config.prices.items():
        of_model = bool(price.input or price.output or price.free)
        for kind in ("input", "output") if price.above else ():
            if getattr(price, kind) and not getattr(price.above, kind):
                raise ConfigError(f'prices."{pattern}".above.{kind}: set it, too')
        if of_model == (price.per_use is not None):
            wanted = "set input and output of a model, or free = true, or per_use of a tool"
            raise ConfigError(f'prices."{pattern}": {wanted}')
        free = price.free and not names_provider(pattern, config.providers)
        sellers = [n for n, p in config.providers.items() if may_overlap(pattern, p.models)]
        for name, provider in config.providers.items():
            sold = free and provider.key_vars and not config.demo
            whole = any(matches(model, [pattern]) for model in provider.models)
            if sold and (whole or (name in sellers and len(sellers) > 1)):
                wanted = f'would make those of {name} free, too; write "PROVIDER/{pattern}"'
                raise ConfigError(f'prices."{pattern}": {wanted}')
    for name, template in config.templates.items():
        places = {"user": template.prompt, "system": template.system}
        used = {(slot, place) for place, text in places.items() for slot in SLOT.findall(text)}
        for slot, place in used ^ {(slot, v.place) for slot, v in template.variables.items()}:
            where = "prompt" if place == "user" else "system"
            wanted = f'{{{slot}}} must stand in {where} and be declared with in = "{place}"'
            raise ConfigError(f"templates.{name}.variables.{slot}: {wanted}")

    jwt, session, budget, keep = config.jwt, config.session, config.budget, config.ledger.keep
    monthly = [cap for name, cap in asdict(budget).items() if name.endswith("_per_month")]
    monthly += [key.budget.per_month or UNLIMITED for key in config.clients.values()]
    secret = "must hold at least 32 bytes, as from `openssl rand -hex 32`; set"
    rules = (
        (keep < 86400, "ledger.keep", 'must be at least "1d"; a day\'s budget is read from it'),
        (keep < 31 * 86400 and min(monthly) < UNLIMITED, "ledger.keep",
         'must be at least "31d" where a month has a budget'),
        (config.redis.lease < 1, "redis.lease", 'must be at least "1s"'),
        (not re.fullmatch(r"[\w.:-]+", config.redis.namespace), "redis.namespace",
         "use letters, digits, and . : _ -"),
        (config.limits.templates_only and not config.templates, "limits.templates_only",
         "needs a [templates.NAME] block to be asked for"),
        (jwt and bool(jwt.secret) == bool(jwt.jwks_url), "jwt.jwks_url",
         "set it, or else jwt.secret (JWT_SECRET), and not both"),
        (jwt and jwt.jwks_url and not jwt.issuer, "jwt.issuer",
         "is needed with jwks_url; it is the `iss` of your tokens"),
        (jwt and jwt.secret and is_short(jwt.secret), "jwt.secret", f"{secret} JWT_SECRET"),
        (session and is_short(session.secret), "session.secret", f"{secret} SESSION_SECRET"),
        (session and not 1 <= session.ttl <= 600, "session.ttl", 'from "1s" to "10m"'),
        (session and not (session.turnstile_secret or jwt), "session.turnstile_secret",
         "set it (TURNSTILE_SECRET_KEY) or a [jwt] block: a session needs a proof"),
        (budget.webhook and is_short(budget.webhook_secret), "budget.webhook_secret",
         f"{secret} BUDGET_WEBHOOK_SECRET"),
    )  # fmt: skip
    for wrong, path, fix in rules:
        if wrong:
            raise ConfigError(f"{path}: {fix}")


def may_overlap(pattern: str, others: Iterable[str]) -> bool:
    """Could `pattern` match a name that one of the others does? Compares what precedes the first
    wildcard; an exact name never overlaps."""
    begins, *rest = WILDCARD.split(pattern)
    heads = [WILDCARD.split(other)[0] for other in others]
    return bool(rest and begins) and any(
        head.startswith(begins) or begins.startswith(head) for head in heads
    )


def names_provider(pattern: str, providers: Iterable[str]) -> bool:
    provider, slash, _ = pattern.partition("/")
    return bool(slash) and provider in providers


def matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def is_short(secret: str) -> bool:
    return len(secret.encode()) < 32


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def load_optional(key: str, package: str, *modules: str) -> Any:
    """Import what a setting needs; the first module. Raises ConfigError."""
    try:
        first, *_ = map(importlib.import_module, modules)
        return first
    except ImportError:
        fix = f"pip install {package}, or uv run --with {package} proxy.py"
        raise ConfigError(f"{key}: needs a package more: {fix}") from None


def is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def vendor_keys(config: Config, environ: Environ) -> dict[str, dict[str, str]]:
    """The keys of each usable provider, "" where it needs none, by names that are safe to publish.
    A built-in provider without a key is left out, as long as one provider remains. Raises
    ConfigError."""
    if config.demo:
        return {name: {name: ""} for name in config.providers}
    keys = {}
    for name, provider in config.providers.items():
        found = {variable: environ.get(variable, "").strip() for variable in provider.key_vars}
        for variable, key in found.items():
            if not (key.isascii() and key.isprintable()):
                raise ConfigError(f"{variable}: is no key: it holds a character that none has")
        missing = ", ".join(variable for variable, key in found.items() if not key)
        if missing and (name not in BUILT_IN_PROVIDERS or any(found.values())):
            raise ConfigError(f"providers.{name}.key_env: {missing} is not set or empty")
        if not missing:
            keys[name] = {f"{name}:{sha256(key)[:16]}": key for key in found.values() or ("",)}
    if not keys:
        wanted = " or ".join(provider.key_vars[0] for provider in config.providers.values())
        raise ConfigError(f"no provider has a key: set {wanted}, or try it with --demo")
    return keys


def check_exposure(config: Config, environ: Environ, public: bool) -> list[str]:
    """Refuse a config that is open to the world by mistake (ConfigError); return warnings."""
    server, total = config.server, config.budget.total_per_day
    open_to_all = not (config.clients or config.jwt or config.session)
    fix = "set ALLOWED_CLIENT_KEYS, or add a [clients.NAME], [jwt] or [session] block"
    if open_to_all and "*" in server.cors_origins:
        raise ConfigError(f'server.cors_origins: "*" lets every page in, so it needs keys: {fix}')
    if open_to_all and public and not server.cors_origins:
        wanted = "needs the origins that may call (CORS_ORIGIN=https://app.example.com) or keys"
        raise ConfigError(f"server.cors_origins: a public bind {wanted}: {fix}")
    if open_to_all and public and server.page:
        raise ConfigError(f"server.page: on a public bind the page needs keys: {fix}")
    platform = next((name for name in PLATFORMS if environ.get(name)), "")
    by_address = open_to_all or config.session
    count_unset = by_address and server.trusted_proxies is None
    spent = "as much as they like" if total == UNLIMITED else f"{total:f} USD"
    warnings = (
        (open_to_all, "no client check: origins stop browsers, not programs, so anyone with curl "
         f"can spend {spent} a day (budget.total_per_day); to close it, {fix}"),
        (total == UNLIMITED and not config.demo, "budget.total_per_day: is unlimited; set it to "
         "the USD that a day may cost"),
        (config.jwt and not config.jwt.audience, "jwt.audience: is not set, so a token that the "
         "issuer made for another app is good here; set it to the `aud` of your tokens, if any"),
        (count_unset and platform,
         f"{platform} is set, so server.trusted_proxies = {PLATFORMS.get(platform)}"),
        (count_unset and not platform, "server.trusted_proxies: behind a proxy all count as one "
         "client; set it to how many there are in front of this server (0 if none)"),
        (not (config.ledger.persistent or config.redis.url or config.demo),
         "ledger.path: what was spent may be "
         "forgotten at a restart, and then every budget begins anew; where the disk is kept, set "
         "ledger.path to it and ledger.persistent = true"),
    )  # fmt: skip
    return [text for holds, text in warnings if public and holds]


# ---- Errors ------------------------------------------------------------------------------------
# ProxyError ─┬─ BadRequest (400: the message names the field)
#             ├─ UpstreamError (the vendor's, with the status and code the caller is shown)
#             └─ BudgetExceeded (402), Stopping and StoreAway (503)

# Any other below 500 is an invalid_request_error.
ERROR_TYPES = {
    401: "authentication_error", 402: "billing_error", 403: "permission_error",
    404: "not_found_error",
    408: "timeout_error", 413: "request_too_large", 429: "rate_limit_error",
    503: "overloaded_error", 504: "timeout_error", 529: "overloaded_error",
}  # fmt: skip


class ProxyError(Exception):
    """An error as the caller sees it. `retry` False says that trying again is useless. An SDK reads
    more of it: which field is at fault (`param`), the vendor's own code, Anthropic's `details`."""

    vendor_code = param = ""
    details: dict[str, Any] | None = None

    def __init__(
        self, status: int, code: str, message: str, after: float | None = None, retry: bool = True
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        other = "api_error" if status >= 500 else "invalid_request_error"
        self.type = ERROR_TYPES.get(status, other)
        self.headers = {} if retry else {"x-should-retry": "false"}
        if after is not None:  # official SDKs sleep whatever they are told
            self.headers["Retry-After"] = str(math.ceil(min(60, max(1, after))))


class BadRequest(ProxyError):
    def __init__(self, message: str) -> None:
        super().__init__(400, "invalid_request", message)
        field, _, _ = message.partition(":")
        self.param = field if field.isascii() and " " not in field else ""


class Stopping(ProxyError):
    def __init__(self) -> None:
        super().__init__(503, "server_stopping", "the server is stopping", after=5)


class ErrorBody(Struct, rename="camel"):
    error: str
    type: str
    code: str
    request_id: str


def error_body(error: ProxyError, request_id: str, dialect: str) -> bytes:
    """The error in the caller's dialect; "" is the browser's."""
    detail: dict[str, Any] = {"type": error.type, "message": error.message}
    match dialect:
        case "":
            body: Any = ErrorBody(error.message, error.type, error.code, request_id)
        case "messages":
            detail |= {"details": error.details} if error.details else {}
            body = {"type": "error", "error": detail, "request_id": request_id}
        case _:
            detail |= {"param": error.param or None, "code": error.vendor_code or error.code}
            body = {"error": detail}
    return msgspec.json.encode(body)


# The vendor's status: what the caller gets. Any other is 502 upstream_error.
UPSTREAM_CODES = {
    **{status: (status, "upstream_rejected") for status in (400, 404, 413, 422)},
    **dict.fromkeys((401, 402, 403), (502, "upstream_auth")), 429: (429, "upstream_rate_limited"),
    504: (504, "upstream_timeout"), 529: (529, "upstream_overloaded"),
}  # fmt: skip

# The status that a vendor's error type in a stream, which has none, stands for.
UPSTREAM_TYPES = {
    **{name: status for status, name in ERROR_TYPES.items()}, "invalid_request_error": 400,
    "rate_limit_exceeded": 429, "insufficient_quota": 429,
    "enforced_spend_limit_reached": 429, "server_overloaded": 529,
}  # fmt: skip
EXHAUSTED = {"insufficient_quota", "enforced_spend_limit_reached", "billing_hard_limit_reached"}

SECRET = re.compile(
    r"\b(?:sk|pk|rk|gsk|xai|org|proj|key)[-_][\w*-]{4,}|\bAIza[\w-]{10,}|\beyJ[\w-]{8,}[\w.-]*"
    r"|\b[Bb]earer\s+\S+"
)


def redact(message: str, known: Iterable[str] = (), length: int = 500) -> str:
    """One line of at most `length` characters with everything key-like removed."""
    for secret in known:
        message = message.replace(secret, "[removed]") if len(secret) > 3 else message
    message = SECRET.sub("[removed]", message)[:length]
    return "".join(c if c.isprintable() else " " for c in message)


class UpstreamError(ProxyError):
    """The vendor failed. The arguments `status` and `error` are the vendor's; `sent` says whether
    it may bill the attempt; `wait` is its retry-after in seconds; `forbidden`, that the request or
    our key may be at fault; `moved`, that another of our keys may be tried at once; `relayed`, that
    the caller was sent the vendor's own error event."""

    def __init__(
        self, status: int, message: str, error: Map[str, Any] = {}, *, code: str = "",
        wait: float | None = None, advice: str = "", sent: bool = True,
    ) -> None:  # fmt: skip
        shown, known_code = UPSTREAM_CODES.get(status, (502, "upstream_error"))
        self.sent, self.wait, self.moved, self.relayed = sent, wait, False, False
        self.forbidden = status == 403
        given = (str(error.get(name) or "") for name in ("code", "param"))
        plain = (text if re.fullmatch(r"[A-Za-z][\w.[\]-]{0,99}", text) else "" for text in given)
        if known_code != "upstream_auth":
            self.vendor_code, self.param = plain
        details = error.get("details")
        deep = details.get("error_code") if isinstance(details, dict) else None
        names = {str(name) for name in (error.get("type"), error.get("code"), deep)}
        passing = status >= 500 or status in (408, 409, 429)
        self.retryable = passing and advice != "false" and EXHAUSTED.isdisjoint(names)
        if known_code == "upstream_auth":
            message = "the vendor refused the proxy's credentials or account"
        after = wait if self.retryable or shown == 429 else None
        super().__init__(shown, code or known_code, message, after=after, retry=self.retryable)


# ---- Messages ----------------------------------------------------------------------------------
# The neutral request, and the events of an answer. Every body that an SDK or a hand-written
# client sends is read into a Request; every vendor's answer is read into Events. No I/O.


class Text(Struct, tag="text"):
    text: str


class Image(Struct, tag="image"):
    """`source` as Anthropic has it: base64 `data` with its media type, or a URL to fetch."""

    source: dict[str, str]


class File(Struct, tag="file"):
    """A PDF as Chat has it: a data URL `file_data`, and its `filename`."""

    file: dict[str, str]


class ToolUse(Struct, tag=True):
    """A call the model made; `arguments` is the JSON text of an object."""

    id: str
    name: str
    arguments: str


class ToolResult(Struct, tag="tool_result", rename={"id": "tool_use_id"}, omit_defaults=True):
    id: str
    content: str
    is_error: bool = False


Part = Text | Image | File | ToolUse | ToolResult


class Message(Struct):
    role: Literal["system", "user", "assistant"]
    content: list[Part]


class Tool(Struct, omit_defaults=True):
    """`strict` is not written where it is False: servers compatible with Chat may not know it."""

    name: str
    description: str
    parameters: dict[str, Any]
    strict: bool = False


class Sampling(Struct):
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None


class Measure(Struct):
    """The size of a request: characters of text and tools, bytes without image data, images, how
    many of those are to be read at original size, and documents."""

    characters: int
    size: int
    images: int
    large: int
    documents: int


class Request(Sampling, kw_only=True, omit_defaults=True):
    """A request, whichever vendor serves it. `thinking` None leaves it to the model. A `native`
    body is sent as it is, in its `dialect`, to `path` where that is not the dialect's own. `hosted`
    lists the tools that run at the vendor, and how often each may be used (0: no limit). `stream`
    is about the vendor's answer, not ours."""

    model: str
    max_tokens: int
    n: int = 1
    native: dict[str, Any] | None = None
    dialect: str = ""
    path: str = ""
    hosted: list[tuple[str, int]] = []
    stream: bool = True
    output_format: dict[str, Any] | None = None  # as Chat has it
    openai: dict[str, Any] = {}  # OPENAI_FIELDS
    effort: str = ""
    parallel: bool | None = None
    messages: list[Message] = []
    system: str = ""
    tools: list[Tool] = []
    tool_choice: str | dict[str, str] | None = None  # as OpenAI Responses has it
    stop: list[str] = []
    thinking: bool | None = None
    measured: Measure | None = None

    @property
    def counts_tokens(self) -> bool:
        """Whether it asks for no answer, but how long it is: that costs nothing."""
        return self.path == "/messages/count_tokens"

    def prompt(self) -> Any:
        """The part that the model reads, as JSON."""
        prompt = {"system": self.system, "tools": self.tools, "messages": self.messages}
        return self.native or msgspec.to_builtins(prompt | {"schema": self.output_format or ""})

    def called(self) -> list[str]:
        """The names of the tools that were called."""
        parts = itertools.chain(*(message.content for message in self.messages))
        return sorted({part.name for part in parts if isinstance(part, ToolUse)})

    def forget(self) -> None:
        """Free the prompt: once the answer begins, nothing needs it."""
        self.messages, self.tools, self.native, self.system = [], [], None, ""

    def measure(self) -> Measure:
        """Cached: it is slow, and limits, budgets and each attempt need it."""
        if self.measured is None:
            prompt = self.prompt()
            conversation = [*blocks([prompt.get(n) for n in ("messages", "input", "system")])]
            images = [data for data in map(image_data, conversation) if data is not None]
            size = len(msgspec.json.encode(self)) - sum(map(len, images))
            large = sum(block.get("detail") == "original" for block in conversation)
            files = ("document", "input_file", "file")
            documents = sum(block.get("type") in files for block in conversation)
            characters = sum(map(len, strings(prompt)))
            self.measured = Measure(characters, size, len(images), large, documents)
        return self.measured


class Counts(Struct, kw_only=True):
    """Tokens of one answer. `input_tokens` includes the cached ones, `cache_write_tokens` those for
    1 h."""

    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    cache_write_1h_tokens: int = 0
    reasoning_tokens: int = 0
    web_searches: int = 0


class Usage(Counts):
    """`known` is False until the vendor has sent the final figures."""

    known: bool = False


class Thinking(Struct, tag=True):
    text: str


class Finish(Struct, tag=True):
    """The last event of a complete answer: stop, length, tool_calls or content_filter; or failed,
    where a native answer in one piece says so itself, and is passed on."""

    reason: str


class Failure(Struct, tag=True):
    """The last event of an answer that the vendor itself says has failed."""

    error: UpstreamError


class Raw(Struct, tag=True):
    """What the vendor sent, for a caller that speaks its dialect. Its decoded events follow."""

    data: bytes


Event = Text | Thinking | ToolUse | Finish | Failure | Raw
Batch = list[Event]  # the events of one network read
Batches = AsyncGenerator[Batch, None]

StopText = Annotated[str, Meta(max_length=100)]  # each is looked for at every token
StopTexts = Annotated[list[StopText], Meta(max_length=16)]


ModelName = Annotated[str, Meta(max_length=200, pattern="^[ -~]*$")]


# Four spellings of one setting.
MAX_TOKENS = ("max_tokens", "max_new_tokens", "max_output_tokens", "max_completion_tokens")


class Body(Sampling):
    """The fields that the proxy reads in a browser's body."""

    model: ModelName | None = None
    messages: list[Any] | None = None
    input: str | list[Any] | None = None
    system: str | list[Any] | None = None
    instructions: str | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    stream: bool | None = None
    max_tokens: Count | None = None
    max_new_tokens: Count | None = None
    max_output_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    stop: StopText | StopTexts | None = None
    stop_sequences: StopTexts | None = None
    enable_thinking: bool | None = None
    template: str | None = None
    variables: dict[str, Any] | None = None


class AnyBody(Body):
    """Those that it reads in a body of any dialect."""

    n: Annotated[int, Meta(ge=1, le=16)] | None = None
    stream_options: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None


# Fields of a body that names a template, fields that only Chat has, with the value that asks for
# nothing, and fields that both of OpenAI's dialects have, and no other.
TEMPLATE_FIELDS = {"template", "variables", "stream"}
CHAT_ONLY = {"n": 1, "functions": [], "function_call": "none", "logprobs": False, "audio": None}
OPENAI_FIELDS = ("prompt_cache_key", "safety_identifier", "user", "metadata", "verbosity")


def parse_body(
    raw: dict[str, Any], limits: Limits, dropped: list[str], default_model: str = "",
    templates: Map[str, Template] = {}, chat: bool = False,
) -> Request:  # fmt: skip
    """Read a browser's body, or one of Chat for a vendor that speaks another dialect. Unknown
    fields are dropped and reported. Raises BadRequest naming the field."""
    for name, idle in CHAT_ONLY.items():
        if chat and raw.get(name, idle) not in (idle, None):
            raise BadRequest(f"{name}: cannot be asked of this model")
    more = {*AnyBody.__struct_fields__, *CHAT_ONLY, *OPENAI_FIELDS}
    known = more if chat else {*Body.__struct_fields__}
    known -= {"template", "variables"}
    if by_template := not chat and raw.get("template") is not None:
        known = TEMPLATE_FIELDS
    drop(sorted(raw.keys() - known), dropped)
    given = convert_body({name: raw[name] for name in raw if name in known}, AnyBody)
    if by_template:
        request, texts = read_template(given, templates)
        dropped += ["max_tokens"] if request.max_tokens > limits.max_tokens else []
        request.max_tokens = min(request.max_tokens, limits.max_tokens)
    else:
        check_lists(raw, limits)
        request = read_request(given, limits, default_model, dropped)
        texts = request.prompt()
    check_texts(texts, limits)
    request.system = lock_prompt(limits.system_prompt, request.system)
    request.openai = {name: raw[name] for name in OPENAI_FIELDS if chat and raw.get(name)}
    return request


def lock_prompt(prompt: str, given: Any) -> Any:
    """The server's own system prompt in front of the caller's."""
    if prompt and isinstance(given, list):
        return [{"type": "text", "text": prompt}, *given]
    return "\n\n".join(filter(None, (prompt, given)))


def drop(lost: list[str], dropped: list[str]) -> None:
    """Add the names of fields not passed on, for the caller: at most 100, and no secrets."""
    if (room := 100 - len(dropped)) > 0:
        new = dict.fromkeys(lost).keys() - {*dropped}
        dropped += [redact(name, length=50) for name in sorted(new)[:room]]


def extra(given: Map[str, Any], known: set[str]) -> list[str]:
    """The names outside `known` that have a value."""
    return [name for name, value in given.items() if value and name not in known]


def decode_body(body: bytes, limits: Limits) -> dict[str, Any]:
    """Bounds the number of values first: 2 bytes of JSON can become 100 bytes of objects. Each
    value follows a comma or bracket; those within texts count as characters anyway."""
    most = limits.max_characters + 100 * limits.max_messages
    if sum(map(body.count, (b",", b"[", b"{"))) > most:
        raise BadRequest(f"body (JSON): at most about {most} values are allowed")
    raw: dict[str, Any] = convert_body(body, dict[str, Any])
    return raw


# Whatever is not JSON, or of another type, raises one of these.
NO_JSON = (msgspec.DecodeError, ValueError, RecursionError)
decode_json = msgspec.json.Decoder().decode  # built once: it runs for every token
# Half of a surrogate pair, to be replaced; group 1, a whole pair or a backslash, is kept.
HALF = re.compile(rb"(\\\\|\\u[dD][89abAB]\w\w\\u[dD][c-fC-F]\w\w)|\\u[dD][89a-fA-F]\w\w")


def read_json(data: bytes) -> Any:
    """Decode a vendor's JSON leniently: Infinity and NaN are accepted, and half of a surrogate pair
    becomes U+FFFD."""
    try:
        return decode_json(data)
    except NO_JSON:
        whole = data.decode(errors="replace").encode()
        return json.loads(HALF.sub(lambda found: found[1] or b"\\ufffd", whole))


def convert_body(body: Any, kind: Any) -> Any:
    """A body, or JSON already read, as `kind`. Raises BadRequest naming the field."""
    try:
        if isinstance(body, bytes):
            return msgspec.json.decode(body, type=kind)
        return msgspec.convert(body, kind)
    except NO_JSON as error:
        message, where = plain_error(error)
        where = re.sub(r"^(\[.*?\])+|\[\.\.\.\]", "", where).strip(".`")
        raise BadRequest(f"{where or 'body (JSON)'}: {message}") from None


# Arguments and schemas of tools, and what a computer's user was asked: no part of the conversation.
OPAQUE = {
    "input", "arguments", "parameters", "input_schema", "schema", "parsed", "parsed_arguments",
    "pending_safety_checks", "acknowledged_safety_checks",
}  # fmt: skip


ESCAPED, WRITTEN = re.compile(r"\\(u[\da-fA-F]{4}|.)"), {"n": "\n", "r": "\r", "t": "\t"}


def readable(text: str) -> str:
    """JSON text with its escapes decoded, as a model reads it."""

    def read(found: re.Match[str]) -> str:
        named = WRITTEN.get(found[1], found[1])
        return chr(int(named[1:], 16)) if len(named) > 1 else named

    return ESCAPED.sub(read, text)


def strings(value: Any) -> Iterator[str]:
    """Every text in a JSON value, without file data; a tool's arguments or schema is one text.
    Texts of a list of blocks are joined, as a denied text may be split between blocks. A token
    given by its number counts as 4 characters. (No recursion: a body may be deep.)"""
    todo = [(value, False)]  # and whether it is in a list, whose texts are joined
    while todo:
        value, listed = todo.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, list):
            texts = (block.get("text") for block in value if isinstance(block, dict))
            if text := "".join(text for text in texts if isinstance(text, str)):
                todo.append((text, False))
            todo += [("????" if isinstance(x, int) else x, True) for x in reversed(value)]
        elif isinstance(value, dict):
            for key, inner in reversed(without_data(value).items()):
                if listed and key == "text" and isinstance(inner, str):
                    continue
                opaque = key == "arguments" or (key == "tools" and inner)
                opaque = opaque or (key in OPAQUE and isinstance(inner, dict))
                if opaque and not isinstance(inner, str):
                    inner = msgspec.json.encode(inner).decode()
                todo.append((inner, False))


def blocks(value: Any) -> Iterator[dict[str, Any]]:
    """Every object of a conversation: its messages, their blocks, and the sources of files."""
    todo = [value]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            yield value
            value = [inner for key, inner in value.items() if key not in OPAQUE]
        if isinstance(value, list):
            todo += reversed(value)


def image_data(block: dict[str, Any]) -> str | None:
    """The data of an image, "" where the vendor fetches it; None for whatever is not an image."""
    match block:
        case {"type": "image", "source": dict(source)}:
            return str(source.get("data") or "")
        case {"type": "input_image" | "image_url" | "computer_screenshot", "image_url": given}:
            url = str(given.get("url") if isinstance(given, dict) else given)
            if url.startswith("data:"):
                return url if url.startswith("data:image/") else None
            return ""
    return None


def without_data(block: dict[str, Any]) -> dict[str, Any]:
    """A block without its file data."""
    match block:
        case {"type": "document", "source": {"type": "base64"}}:
            return block | {"source": ""}
        case {"type": "input_file", "file_data": _}:
            return block | {"file_data": ""}
        case {"type": "file", "file": {"file_data": _, **file}}:
            return block | {"file": file}
    return block | {"source": "", "image_url": ""} if image_data(block) else block


def check_texts(value: Any, limits: Limits) -> None:
    """Raises BadRequest for too much text, or for a denied one."""
    texts = [*strings(value)]
    if (count := sum(map(len, texts))) > limits.max_characters:
        allowed = f"at most {limits.max_characters} are allowed"
        raise BadRequest(f"messages: {count} characters, {allowed}")
    text = "\n".join(texts) if limits.denied else ""
    text = f"{text}\n{readable(text)}".casefold()  # tool arguments are JSON
    if any(denied.casefold() in text for denied in limits.denied):
        raise BadRequest("messages: hold a text that is not allowed here")


def check_lists(raw: Map[str, Any], limits: Limits) -> None:
    """Cheap checks of a body of any dialect, before it is parsed."""
    if limits.templates_only:
        raise BadRequest("template: only templates may be asked for, at /api")
    if (raw.get("tools") or raw.get("functions")) and not limits.allow_tools:
        raise BadRequest("tools: are not allowed here")
    lists = {name: value for name, value in raw.items() if isinstance(value, list)}
    for key in ("messages", "input"):
        if sum(isinstance(item, dict) for item in lists.get(key, ())) > limits.max_messages:
            raise BadRequest(f"{key}: at most {limits.max_messages} messages are allowed")
    # a body of a million empty blocks would block the event loop
    items = [item for value in lists.values() for item in value if isinstance(item, dict)]
    inner = [value for item in items for value in item.values() if isinstance(value, list)]
    if sum(map(len, (*lists.values(), *inner))) > 10 * limits.max_messages:
        raise BadRequest(f"messages: at most {10 * limits.max_messages} blocks are allowed")


def read_length(given: AnyBody, limits: Limits, dropped: list[str]) -> int:
    """The lowest of the values given and the limit. Names other than the last one, and those of
    values above the limit, are reported."""
    lengths: dict[str, int] = {n: v for n, v in asdict(given).items() if n in MAX_TOKENS and v}
    last = next(reversed(lengths), "")
    dropped += [n for n, tokens in lengths.items() if tokens > limits.max_tokens or n != last]
    return min([*lengths.values(), limits.max_tokens])


def read_request(given: AnyBody, limits: Limits, default_model: str, dropped: list[str]) -> Request:
    stops = [given.stop] if isinstance(given.stop, str) else given.stop or []
    effort = given.reasoning_effort or ""
    if effort not in ("", "none", "minimal", "low", "medium", "high", "xhigh", "max"):
        wanted = "none, minimal, low, medium, high, xhigh or max"
        raise BadRequest(f"reasoning_effort: must be {wanted}")
    choice = given.tool_choice if isinstance(given.tool_choice, dict) else {}
    alone = choice.get("disable_parallel_tool_use") is True  # as Anthropic has it
    request = Request(
        model=given.model or default_model,
        max_tokens=read_length(given, limits, dropped),
        tools=[read_tool(tool, f"tools[{i}]", dropped) for i, tool in enumerate(given.tools or ())],
        stop=[text for text in (*stops, *(given.stop_sequences or ())) if text],
        thinking=effort not in ("none", "minimal") if effort else given.enable_thinking,
        effort=effort,
        parallel=False if alone else given.parallel_tool_calls,
        output_format=read_format(given.response_format),
        **{name: getattr(given, name) for name in Sampling.__struct_fields__},
    )
    if given.messages is not None and given.input is not None:
        raise BadRequest("input: send either messages or input, not both")
    key = "messages" if given.input is None else "input"
    items = getattr(given, key) or []
    items = [{"role": "user", "content": items}] if isinstance(items, str) else items
    leading = [{"role": "system", "content": t} for t in (given.instructions, given.system) if t]
    relabelled = None if given.input is None else not limits.allow_system
    messages = read_items(leading, "system", dropped) + read_items(items, key, dropped, relabelled)
    if not limits.allow_system and any(message.role == "system" for message in messages):
        raise BadRequest(f"{'system' if leading else key}: a system prompt is not allowed here")
    request.system, request.messages = join_messages(messages)
    if not request.messages:
        wanted = 'is missing; send [{"role": "user", "content": "…"}]'
        raise BadRequest(f"{key}: {'must hold a message that is not empty' if items else wanted}")
    if request.tools and given.tool_choice is not None:
        request.tool_choice = read_tool_choice(given.tool_choice, request.tools)
    elif given.tool_choice is not None:
        dropped.append("tool_choice")
    return request


def read_format(given: Any) -> dict[str, Any] | None:
    match given:
        case {"type": "json_schema", "json_schema": {"schema": dict()}}:
            return dict(given)
        case {"type": "json_object"}:
            return {"type": "json_object"}
        case None | {"type": "text"}:
            return None
    raise BadRequest("response_format: must be text, json_object or a json_schema")


ITEM_KEYS = {"type", "role", "content", "refusal", "tool_calls", "tool_call_id"}


def read_items(
    items: list[Any], key: str, dropped: list[str], relabelled: bool | None = None
) -> list[Message]:
    """The browser's SDK may have `relabelled` the assistant's turns as `developer`: not at all
    (None), after the first user message (False), or from the start (True)."""
    messages = []
    for i, item in enumerate(items):
        where = f"{key}[{i}]"
        if isinstance(item, dict) and isinstance(item.get("role"), str):
            item = item | {"role": clean(item["role"])}
            lost = extra(item, ITEM_KEYS)
            for name in {"function_call", "audio"}.intersection(lost):
                raise BadRequest(f"{where}.{name}: cannot be said to this model")
            drop(lost, dropped)
        match item:
            case {"type": "function_call" | "reasoning"}:
                messages.append(Message("assistant", read_block(item, where, dropped)))
            case {"type": "function_call_output"} | {"role": "tool"}:
                messages.append(Message("user", read_block(item, where, dropped)))
            case {"role": "user" | "assistant" | "system" | "developer" as role}:
                if role == "user" and relabelled is not None:
                    relabelled = True
                if role == "developer":
                    role = "assistant" if relabelled else "system"
                messages.append(Message(role, read_content(item, where, dropped)))
            case _:
                roles = "user, assistant, system, developer, or tool with its tool_call_id"
                raise BadRequest(f"{where}: needs a role ({roles}), or must be a function_call")
    return messages


# Control characters, line breaks, and what turns the direction of text around.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def clean(text: str) -> str:
    return CONTROL.sub("", text)


# Another vendor's id may hold characters that Anthropic's pattern forbids.
own_id = functools.partial(re.sub, r"[^a-zA-Z0-9_-]", "_")


def read_content(item: dict[str, Any], where: str, dropped: list[str]) -> list[Part]:
    parts: list[Part] = []
    for key in ("content", "refusal", "tool_calls"):
        given = item.get(key) or ""
        for i, block in enumerate(given if isinstance(given, list) else [given]):
            parts += read_block(block, f"{where}.{key}[{i}]", dropped)
    if item["role"] != "user" and any(isinstance(part, Image | File) for part in parts):
        raise BadRequest(f"{where}.content: only a user's message can hold images or files")
    return parts


BLOCK_KEYS = {
    "type", "role", "text", "refusal", "source", "image_url", "detail", "id", "call_id", "status",
    "tool_call_id", "tool_use_id", "name", "arguments", "input", "result", "output", "content",
    "is_error", "file",
}  # fmt: skip
THOUGHTS = ("thinking", "redacted_thinking", "reasoning")


def read_block(block: Any, where: str, dropped: list[str]) -> list[Part]:
    """Convert a content block, tool call or tool result; empty if it cannot be passed on."""
    block = block if isinstance(block, dict) else {"type": "text", "text": block}
    if isinstance(function := block.get("function"), dict):  # Chat wraps its calls
        drop(extra(block, BLOCK_KEYS | {"function", "index"}), dropped)
        block = {"type": "function_call", "id": block.get("id")} | function
    ids = ("call_id", "tool_call_id", "tool_use_id", "id")
    call = next((block[key] for key in ids if key in block), None)
    call = own_id(call) if isinstance(call, str) else None
    kind = block.get("type", block.get("role"))
    if kind in THOUGHTS:  # opaque to every vendor but the one that wrote it
        drop([kind.removeprefix("redacted_")], dropped)
        return []
    drop(extra(block, BLOCK_KEYS), dropped)
    match kind, block:
        case "text" | "input_text" | "output_text", {"text": str(text)}:
            return [Text(text)]
        case "refusal", {"refusal": str(text)}:
            return [Text(text)]
        case ("image", {"source": given}) | (_, {"image_url": given}):
            detail = given if isinstance(given, dict) and "detail" in given else block
            drop(["detail"] if detail.get("detail", "auto") != "auto" else [], dropped)
            if isinstance(given, dict):
                drop(extra(given, {"type", "media_type", "data", "url", "detail"}), dropped)
            return [read_image(given, where)]
        case "file", {"file": {"file_data": str(data)} as file}:
            drop(extra(file, {"filename", "file_data"}), dropped)
            if not re.fullmatch(r"data:application/pdf;base64,[A-Za-z0-9+/=]+", data):
                raise BadRequest(f"{where}.file.file_data: must be data:application/pdf;base64,…")
            return [File({"filename": str(file.get("filename") or "PDF"), "file_data": data})]
        case "function_call" | "tool_use", {"name": str(name)} if call is not None:
            given = block.get("arguments", block.get("input"))
            return [ToolUse(call, clean(name), read_arguments(given, where))]
        case "function_call_output" | "tool_result" | "tool", _ if call is not None:
            given = block.get("result", block.get("output", block.get("content")))
            text = read_result(given, where, dropped)
            return [ToolResult(call, text, bool(block.get("is_error")))]
    raise BadRequest(f"{where}: must be a complete text, image, PDF, tool call or tool result")


def read_arguments(given: Any, where: str) -> str:
    try:
        given = read_json(given.encode() or b"{}") if isinstance(given, str) else given
        return msgspec.json.encode(msgspec.convert(given or {}, dict[str, Any])).decode()
    except NO_JSON:
        raise BadRequest(f"{where}.arguments: must be a JSON object") from None


def is_text(block: Any) -> bool:
    match block:
        case {"type": "text" | "input_text" | "output_text", "text": _}:
            return True
    return isinstance(block, dict) and block.keys() == {"text"}


def read_result(given: Any, where: str, dropped: list[str]) -> str:
    """A tool's result as text: a string as it is, text blocks joined, anything else as JSON."""
    if any(image_data(block) is not None for block in blocks(given)):
        raise BadRequest(f"{where}: the result of a tool can hold no image here")
    if given and isinstance(given, list) and all(is_text(block) for block in given):
        drop([name for block in given for name in extra(block, {"type", "text"})], dropped)
        return "".join(str(block["text"]) for block in given)
    if given is None or isinstance(given, str):
        return given or ""
    return msgspec.json.encode(given).decode()


def read_image(given: Any, where: str) -> Image:
    match given:
        case {"media_type": str(kind), "data": str(data)}:
            return read_image(f"data:{kind};base64,{data}", where)
        case str(url) | {"url": str(url)}:
            if found := re.fullmatch(r"data:(image/[\w.+-]+);base64,([A-Za-z0-9+/=\s]+)", url):
                kind = found[1].lower().replace("/jpg", "/jpeg")  # which every vendor accepts
                return Image({"type": "base64", "media_type": kind, "data": found[2]})
            if re.match(r"https?://", url):
                return Image({"type": "url", "url": url})
    raise BadRequest(f"{where}: an image is an http(s) URL, or base64 data with a media type")


TOOL_KEYS = {
    "type", "definition", "function", "name", "description", "parameters", "input_schema", "strict",
}  # fmt: skip


def read_tool(tool: Any, where: str, dropped: list[str]) -> Tool:
    match tool:
        case {"definition": dict(inner)} | {"function": dict(inner)} | dict(inner):
            if (kind := tool.get("type", "function")) not in ("function", "custom"):
                kind = redact(str(kind), length=50)
                raise BadRequest(f"{where}.type: {kind!r} runs at the vendor and is not allowed")
            drop(extra(tool, TOOL_KEYS) + extra(inner, TOOL_KEYS), dropped)
            schema = inner.get("parameters") or inner.get("input_schema") or {}
            name = inner.get("name")
            if isinstance(name, str) and (name := clean(name)) and isinstance(schema, dict):
                about = str(inner.get("description") or "")
                schema = {"type": "object", "properties": {}} | schema  # OpenAI wants both
                return Tool(name, about, schema, inner.get("strict") is True)
    raise BadRequest(f"{where}: needs a name, and parameters that are a JSON schema")


def read_tool_choice(given: Any, tools: list[Tool]) -> str | dict[str, str]:
    match given:
        case str(mode) | {"type": str(mode)} if mode in ("auto", "none", "required", "any"):
            return "required" if mode == "any" else mode
        case str(name) | {"function": {"name": str(name)}} | {"name": str(name)}:
            if (name := clean(name)) in [tool.name for tool in tools]:
                return {"type": "function", "name": name}
    raise BadRequest("tool_choice: must be auto, none, required or the name of one of the tools")


def calls(message: Message, results: list[ToolResult]) -> bool:
    """Does it make a call that one of the results answers?"""
    ids = {result.id for result in results}
    return any(isinstance(part, ToolUse) and part.id in ids for part in message.content)


def join_messages(messages: list[Message]) -> tuple[str, list[Message]]:
    """Lift out the leading system text, drop empty text, join neighbours of one role, and put the
    results of tool calls next to the calls: every vendor wants that."""
    system: list[str] = []
    joined: list[Message] = []
    for message in messages:
        parts = [p for p in message.content if not isinstance(p, Text) or p.text.strip()]
        if results := [p for p in parts if isinstance(p, ToolResult)]:
            at = next((i for i in reversed(range(len(joined))) if calls(joined[i], results)), -1)
            if 0 <= at < len(joined) - 1 and joined[at + 1].role == "user":
                joined[at + 1].content.extend(results)
            elif at >= 0:
                joined.insert(at + 1, Message("user", [*results]))
            parts = [p for p in parts if at < 0 or not isinstance(p, ToolResult)]
        if not parts:
            continue
        if not joined and message.role == "system":
            system += [part.text for part in parts if isinstance(part, Text)]
        elif joined and joined[-1].role == message.role:
            joined[-1].content.extend(parts)
        else:
            joined.append(Message(message.role, parts))
    for message in joined:
        message.content.sort(key=lambda part: not isinstance(part, ToolResult))
    return "\n\n".join(system), joined


# ---- Templates ---------------------------------------------------------------------------------
# Requests that the server's owner has written. A page names one and gives the values of its slots,
# which are inserted as plain text, once: slots within a value are not filled.


def read_template(given: Body, templates: Map[str, Template]) -> tuple[Request, list[str]]:
    """The request, and the texts in it that the page chose. Adjacent slots make one text."""
    if (template := templates.get(given.template or "")) is None:
        known = ", ".join(templates) or "none"
        raise BadRequest(f"template: is not configured; there are: {known}")
    variables = given.variables or {}
    for name in sorted(variables.keys() ^ template.variables.keys()):
        wrong = "is missing" if name in template.variables else "is not one of the template's"
        raise BadRequest(f"variables.{redact(name, length=50)}: {wrong}")
    values = {n: read_variable(n, v, variables[n]) for n, v in template.variables.items()}

    def fill(text: str) -> str:
        return SLOT.sub(lambda slot: values[slot[1]], text)

    if not (prompt := fill(template.prompt)).strip():
        raise BadRequest("variables: leave nothing to ask")
    # \0 separates the last slot of the one from the first of the other
    texts = [fill(found[0]) for found in SLOTS.finditer(f"{template.prompt}\0{template.system}")]
    request = Request(
        model=template.model,
        max_tokens=template.max_tokens,
        system=fill(template.system),
        messages=[Message("user", [Text(prompt)])],
        tools=template_tools(template),
    )
    return request, texts


def template_tools(template: Template) -> list[Tool]:
    return [read_tool(tool, f"tools[{i}]", []) for i, tool in enumerate(template.tools)]


def read_variable(name: str, variable: Variable, value: Any) -> str:
    where = f"variables.{name}"
    kind = int | float if variable.kind == "number" else str
    if isinstance(value, bool) or not isinstance(value, kind):
        raise BadRequest(f"{where}: must be a {variable.kind}")
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    if len(text) > variable.max_length:
        raise BadRequest(f"{where}: at most {variable.max_length} characters are allowed")
    if variable.kind == "line" and text != clean(text):
        raise BadRequest(f"{where}: must be one line, without control characters")
    return text


# ---- Native bodies -----------------------------------------------------------------------------
# What official SDKs send, for a vendor that speaks the same dialect. It is decoded, checked and
# encoded anew, so that what was checked is what is sent. Only fields known to be harmless pass:
# none that reach stored state, another price, or tools that run at the vendor.

NATIVE_FIELDS = {
    "messages": "model messages max_tokens system tools tool_choice stop_sequences stream "
    "temperature top_p top_k thinking metadata output_config output_format cache_control",
    "responses": "model input instructions max_output_tokens tools tool_choice text reasoning "
    "parallel_tool_calls temperature top_p store include stream stream_options user metadata "
    "prompt_cache_key safety_identifier truncation top_logprobs max_tool_calls",
    "chat": "model messages max_tokens max_completion_tokens tools tool_choice functions stop n "
    "function_call parallel_tool_calls response_format reasoning_effort seed temperature top_p "
    "presence_penalty frequency_penalty logit_bias logprobs top_logprobs stream stream_options "
    "user metadata prompt_cache_key safety_identifier verbosity store",
    "messages/count_tokens": "model messages system tools tool_choice thinking output_config "
    "output_format cache_control",
    "embeddings": "model input encoding_format dimensions user",
}
# What a conversation is made of: the types of messages, of their blocks, and of what is in these.
# Not what only tools that run at the vendor write, nor what changes the request from within.
NATIVE_BLOCKS = {
    "messages": "text image document search_result tool_use tool_result thinking redacted_thinking "
    "base64 url file content ephemeral direct char_location page_location "
    "content_block_location search_result_location web_search_result web_search_result_location "
    "web_search_tool_result_error",
    "responses": "message input_text input_image input_file output_text refusal text reasoning "
    "summary_text reasoning_text function_call function_call_output custom_tool_call "
    "custom_tool_call_output direct url_citation search open_page find_in_page url "
    "local_shell_call exec local_shell_call_output apply_patch_call create_file update_file "
    "delete_file apply_patch_call_output shell_call local shell_call_output exit timeout "
    "computer_call click double_click drag keypress move screenshot scroll type wait "
    "computer_call_output computer_screenshot",
    "chat": "text image_url refusal function custom file ephemeral url_citation thinking "
    "reasoning.text reasoning.summary reasoning.encrypted",
}
# Betas that SDKs send by default, and that change neither the price nor what is stored.
PLAIN_BETAS = {
    "structured-outputs-2025-11-13", "fine-grained-tool-streaming-2025-05-14", "pdfs-2024-09-25",
    "token-counting-2024-11-01", "mid-conversation-system-2026-04-07",
    "advanced-tool-use-2025-11-20", "prompt-caching-2024-07-31", "computer-use-2024-10-22",
    "computer-use-2025-01-24", "computer-use-2025-11-24", "context-management-2025-06-27",
}  # fmt: skip
# Values that mean the same as leaving the field out.
PLAIN_VALUES = {
    "service_tier": ("default", "standard_only"), "modalities": (["text"],),
    "prompt_cache_retention": ("in_memory",),
}  # fmt: skip
# Tools that the vendor defines and the caller's own program runs.
CALLERS_TOOLS = (
    "function", "custom", "bash_*", "text_editor_*", "memory_*", "computer_*", "computer",
    "local_shell", "apply_patch",
)  # fmt: skip
NOT_STORED = "store: false tells an SDK to (AI SDK: providerOptions.openai.store)"
ALLOW = "the server's owner can add it to `allow` of the provider, and of its fallbacks"


def parse_native(
    raw: dict[str, Any], kind: str, limits: Limits, allowed: Iterable[str], dropped: list[str]
) -> Request:
    """Check a body of `kind`, a key of NATIVE_FIELDS. Raises BadRequest naming the field."""
    unknown = raw.keys() - {*NATIVE_FIELDS[kind].split(), *allowed}
    off = {name for name in unknown if raw[name] is None or raw[name] is False}
    drop([name for name in off if raw[name] is False], dropped)
    raw = {name: value for name, value in raw.items() if name not in off}
    for name in sorted(unknown & raw.keys()):
        if raw[name] not in PLAIN_VALUES.get(name, ()):
            wrong = f"{redact(name, length=50)}: is not passed on by this proxy; {ALLOW}"
            error = BadRequest(wrong)
            if name == "thread":  # on this error an SDK's tool runner goes on without one
                error.details = {"error_code": "thread_unsupported_request", "unsupported": [name]}
            raise error
    check_lists(raw, limits)
    given = convert_body(raw, AnyBody)
    key = "messages" if "messages" in NATIVE_FIELDS[kind] else "input"
    if not raw.get(key):
        raise BadRequest(f"{key}: is missing")
    for block in blocks([raw[key], raw.get("tools"), raw.get("tool_choice")]):
        if isinstance(block.get("name"), str):
            block["name"] = clean(block["name"])
    check_texts(raw, limits)
    known = NATIVE_BLOCKS.get(kind.partition("/")[0], "")
    check_conversation(raw, key, limits, {*known.split(), *allowed})
    hosted = []
    for i, tool in enumerate(given.tools or ()):
        if not runs_at_caller(tool):
            name = str(tool.get("type"))
            if name not in allowed:
                name = redact(name, length=50)
                raise BadRequest(f"tools[{i}].type: {name!r} runs at the vendor; {ALLOW}")
            # only this dialect's field: the vendor ignores others, and the hold would be too low
            uses = raw.get("max_tool_calls") if kind == "responses" else tool.get("max_uses")
            hosted.append((name, max(0, uses) if isinstance(uses, int) else 0))
            if hosted[-1][1] > 1000:
                raise BadRequest(f"tools[{i}]: at most 1000 uses are allowed")
    native = raw.copy()
    if "store" not in allowed and (native.get("store") or kind != "responses"):
        dropped += ["store"] if native.pop("store", None) else []
    prompt, system = limits.system_prompt, "system" if kind == "messages" else "instructions"
    if prompt and kind == "chat":
        native["messages"] = [{"role": "system", "content": prompt}, *native["messages"]]
    elif prompt and kind in NATIVE_BLOCKS:
        native[system] = lock_prompt(prompt, native.get(system))
    path = "" if kind in NATIVE_BLOCKS else f"/{kind}"
    return Request(
        model=raw["model"], max_tokens=0 if path else read_length(given, limits, dropped),
        n=given.n or 1, hosted=hosted, native=native, path=path, stream=given.stream is True,
    )  # fmt: skip


def runs_at_caller(tool: dict[str, Any]) -> bool:
    match tool:
        case {"type": "shell", "environment": {"type": "local"}}:
            return True
        case {"type": "namespace", "tools": list(tools)}:
            return all(type(t) is dict and t.get("type") in ("function", "custom") for t in tools)
    return matches(str(tool.get("type", "custom")), CALLERS_TOOLS)


def forwarded_headers(headers: Headers, dialect: str, allowed: Iterable[str]) -> dict[str, str]:
    """The caller's headers that go to the vendor. Raises BadRequest."""
    names = ("anthropic-version", "anthropic-beta") if dialect == "messages" else ()
    for beta in split_list(headers.get("anthropic-beta", "")):
        if beta not in PLAIN_BETAS and beta not in allowed:
            raise BadRequest(f"anthropic-beta: {redact(beta, length=50)} is not passed on; {ALLOW}")
    return {name: headers[name] for name in (*names, "idempotency-key") if name in headers}


def is_kept(block: dict[str, Any]) -> bool:
    """Does it refer to what the vendor stores or fetches, or hold audio (priced apart)?"""
    match {name: value for name, value in block.items() if value is not None}:
        case (
            {"file_id": _} | {"file_url": _} | {"type": "document", "source": {"type": "url"}}
            | {"type": "container_upload" | "input_audio"}
        ):  # fmt: skip
            return True
        case {"image_url": _} | {"input_audio": _} | {"video_url": _} if "type" not in block:
            return True  # some vendors infer the missing type
        case {"id": _}:  # without type and role, Responses looks the id up
            return not any(block.get(key) for key in ("type", "role", "function"))
    return False


ROLES = (None, "user", "assistant", "system", "developer", "tool", "function")


def check_conversation(raw: Map[str, Any], key: str, limits: Limits, known: set[str]) -> None:
    """Raises BadRequest for unknown types or roles, or a system prompt not allowed."""
    system = bool(raw.get("system") or raw.get("instructions"))
    lists = [(n, raw[n]) for n in (key, "system") if isinstance(raw.get(n), list)]
    for where, item in ((f"{n}[{i}]", item) for n, items in lists for i, item in enumerate(items)):
        for block in blocks(item):
            system = system or block.get("role") in ("system", "developer")
            if block is item and block.get("role") not in ROLES:
                raise BadRequest(f"{where}.role: must be one of {', '.join(ROLES[1:])}")
            kind = "files" if is_kept(block) else block.get("type")
            if kind is not None and str(kind) not in known:
                wrong = f"{redact(str(kind), length=50)} is not passed on by this proxy; {ALLOW}"
                if kind == "item_reference":
                    wrong = f"{kind}: nothing is stored, so send the item itself; {NOT_STORED}"
                raise BadRequest(f"{where}: {wrong}")
    if system and not limits.allow_system:
        raise BadRequest("system: a system prompt is not allowed here")


# ---- Clients -----------------------------------------------------------------------------------
# Who is calling: a key, a user of the app by its JWT, a session of ours, this machine itself, or an
# address. Body fields and headers such as X-User-ID never decide it.


class Client(Struct, frozen=True):
    """Who pays, and what it may do. A session is its parent's (a user or an address): it spends the
    parent's money and fills the parent's buckets, so that more sessions buy nothing."""

    id: str
    limits: Limits
    models: tuple[str, ...] = ("*",)
    parent_models: tuple[str, ...] = ("*",)
    group: str = ""
    per_day: Usd = UNLIMITED
    per_month: Usd = UNLIMITED
    session: str = ""
    since: float | None = None  # when its session began, in seconds since 1970
    per_session: Usd = UNLIMITED

    def may_use(self, model: str) -> bool:
        return matches(model, self.models) and matches(model, self.parent_models)


FORWARDING = {"forwarded", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-real-ip"}
LOCAL_HOST = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:\d+)?")


def read_headers(scope: Scope) -> Headers:
    headers: Headers = {}
    for raw_name, raw_value in scope["headers"]:
        name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


class KeySet:
    """The public keys of an issuer, by their ids. Fetched again when ten minutes old, or when a
    token names an unknown one, but at most every 30 s; while the issuer is down the old ones stay
    in use."""

    fresh, pause, patience = 600.0, 30.0, 5.0  # seconds

    def __init__(self, url: str) -> None:
        self.url, self.lock = url, asyncio.Lock()
        self.fetched = self.tried = -math.inf
        self.keys: dict[str | None, Any] = {}

    def due(self, key_id: str | None) -> bool:
        now = time.monotonic()
        stale = now - self.fetched > self.fresh or key_id not in self.keys
        return stale and now - self.tried > self.pause

    async def find(self, key_id: str | None, http: httpx.AsyncClient) -> Any:
        if key_id not in self.keys or self.due(key_id):
            async with self.lock:  # another task may have fetched it by then
                if self.due(key_id):
                    self.tried = time.monotonic()
                    await self.fetch(http)
        if not self.keys:
            message = "the keys that sign the app's logins cannot be fetched"
            raise ProxyError(503, "identity_unavailable", message, after=30)
        return self.keys.get(key_id)

    async def fetch(self, http: httpx.AsyncClient) -> None:
        import jwt

        try:
            async with asyncio.timeout(self.patience):
                reply = (await http.get(self.url)).raise_for_status()
            self.keys = {key.key_id: key for key in jwt.PyJWKSet.from_json(reply.text).keys}
            self.fetched = self.tried
        except Exception as error:  # whatever the issuer sends
            LOG.error("jwt.jwks_url: %s gave no keys (%s)", self.url, redact(repr(error)))


def read_token(headers: Headers) -> str:
    """The key or token that was sent, if it is not too long to be one."""
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    token = bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
    return token if len(token) <= 65536 else ""


def from_origins(headers: Headers) -> tuple[str, ...]:
    """The origins that the page may have: browsers send none with a same-origin GET."""
    if "origin" in headers or headers.get("sec-fetch-site") != "same-origin":
        return (headers.get("origin", ""),)
    return tuple(f"{scheme}://{headers.get('host', '')}" for scheme in ("http", "https"))


SESSION_ISSUER = "proxy.py/session"


class SessionRequest(Struct, forbid_unknown_fields=True):
    turnstile: Annotated[str, Meta(max_length=2048)] = ""


class Clients:
    """Decides whether an origin may call and which client a request belongs to."""

    http: httpx.AsyncClient  # for an issuer's keys; the app's lifespan opens it

    def __init__(self, config: Config, environ: Environ, public: bool) -> None:
        self.config, self.server, self.public = config, config.server, public
        self.key_set = KeySet(config.jwt.jwks_url if config.jwt else "")
        self.closed = bool(config.clients or config.jwt or config.session)
        added = [count for name, count in PLATFORMS.items() if environ.get(name) and public]
        given = config.server.trusted_proxies
        self.proxies = given if given is not None else next(iter(added), 0)
        self.keys = [(key.key_sha256, self.of_key(n, key)) for n, key in config.clients.items()]
        # derived, so that no token of the app's passes for ours, even with the same secret
        secret = f"session {config.session.secret}" if config.session else ""
        self.session_key = hashlib.sha256(secret.encode()).digest()
        if config.jwt or config.session:
            load_optional("jwt, session", "'pyjwt[crypto]'", "jwt", "cryptography")

    def trusted(self, peer: str, headers: Headers) -> bool:
        """Is it this machine's own user, on a bind nobody else reaches? A tunnel, or a page that
        rebinds its name to 127.0.0.1, shows in a forwarding header or in the Host."""
        own = not self.public and is_loopback(peer)
        local = LOCAL_HOST.fullmatch(headers.get("host", "")) is not None
        return own and local and FORWARDING.isdisjoint(headers)

    def origin_allowed(self, origin: str, host: str) -> bool:
        if not {origin, "*"}.isdisjoint(self.server.cors_origins):
            return True
        scheme, _, place = origin.partition("://")
        if not self.public:
            return scheme in ("http", "https") and LOCAL_HOST.fullmatch(place) is not None
        return self.server.page and self.closed and place == host

    async def identify(self, peer: str, headers: Headers) -> Client:
        """Who is at the other end of a connection from the address `peer`. Raises 401 where keys or
        tokens are configured and none that is good was sent."""
        if self.closed:
            token = read_token(headers)
            client = self.by_key(token) or self.by_session(token, *from_origins(headers))
            if client := client or await self.by_jwt(token):
                return client
            message = "a valid key or token is needed: send it as `Authorization: Bearer KEY`"
            raise ProxyError(401, "invalid_key", message, retry=False)
        if self.trusted(peer, headers):
            return self.client("local")
        if not self.public:
            fix = "its owner can configure client keys, or bind it publicly"
            raise ProxyError(403, "not_local", f"this proxy serves only its own machine; {fix}")
        return self.by_address(peer, headers)

    def client(self, id: str, **more: Any) -> Client:
        budget = self.config.budget
        address_only = Usd("0.5") if id.startswith("ip:") else UNLIMITED
        per_day = address_only if budget.client_per_day is None else budget.client_per_day
        caps = {"per_day": per_day, "per_month": budget.client_per_month}
        return Client(id, **{"limits": self.config.limits} | caps | more)

    def kinds(self) -> list[Client]:
        """A sample of each kind of client."""
        session = self.config.session
        more = {"session": "any", "per_session": session.budget} if session else {}
        kind = "ip:" if session or not self.closed else "key:"
        return [self.client(kind, group="any", **more), *(client for _, client in self.keys)]

    def by_address(self, peer: str, headers: Headers) -> Client:
        return self.client(f"ip:{network(self.address(peer, headers))}")

    def of_key(self, name: str, key: Key) -> Client:
        caps = {cap: usd for cap, usd in asdict(key.budget).items() if usd is not None}
        more = {"limits": key.limits, "models": key.models, "group": key.group}
        return self.client(f"key:{name}", **more, **caps)

    def by_key(self, token: str) -> Client | None:
        digest = sha256(token)  # compared with every key: no timing to learn from
        found = [client for known, client in self.keys if hmac.compare_digest(digest, known)]
        return found[-1] if found else None

    async def by_jwt(self, token: str) -> Client | None:
        """The app's user whose token it is."""
        if (table := self.config.jwt) is None:
            return None
        import jwt

        key, algorithms = table.secret, ["HS256"]
        if table.jwks_url:
            key, algorithms = "", ["RS256", "ES256", "EdDSA"]
            with contextlib.suppress(jwt.PyJWTError):  # of a token that read_claims refuses
                header = jwt.get_unverified_header(token)
                key = await self.key_set.find(header.get("kid"), self.http)
        expected = {"issuer": table.issuer or None, "audience": table.audience or None}
        claims = read_claims(token, key, algorithms, leeway=table.leeway, **expected)
        user, group = (read_claim(claims, c) for c in (table.client_claim, table.group_claim))
        if not user or group is None:
            return None
        return self.client(f"jwt:{user}", models=table.models, group=group)

    def by_session(self, token: str, *origins: str) -> Client | None:
        if self.config.session is None:
            return None
        claims = read_claims(token, self.session_key, ["HS256"], issuer=SESSION_ISSUER)
        if claims.get("origin") not in origins or "client" not in claims:
            return None
        budget = self.config.session.budget
        return self.client(claims["sub"], per_session=budget, **claims["client"])

    def new_session(self, parent: Client, origin: str) -> dict[str, Any]:
        """A token for what `parent` may do, from `origin` alone and for a few minutes."""
        import jwt

        table = self.config.session
        assert table
        now, seconds = int(time.time()), int(table.ttl)
        models = table.models if table.models != ("*",) else parent.models
        client = {"session": secrets.token_hex(12), "since": now, "group": parent.group}
        client |= {"models": models, "parent_models": parent.models}
        claims = {"iss": SESSION_ISSUER, "sub": parent.id, "exp": now + seconds}
        claims |= {"origin": origin, "client": client}
        token = jwt.encode(claims, self.session_key, "HS256")
        return {"token": token, "expiresIn": seconds, "models": models}

    def address(self, peer: str, headers: Headers) -> str:
        """The n-th X-Forwarded-For value from the right, n being the proxies we trust; the
        connection's own when there are fewer."""
        values = headers.get("x-forwarded-for", "").split(",")
        text = values[-self.proxies].strip() if 0 < self.proxies <= len(values) else peer
        if with_port := re.fullmatch(r"\[(.+)\](?::\d*)?|([^:]+):\d*", text):
            text = with_port[1] or with_port[2]
        try:
            address = ipaddress.ip_address(text.partition("%")[0])
        except ValueError:
            return peer
        return str(getattr(address, "ipv4_mapped", None) or address)


def network(address: str) -> str:
    """What counts as one caller: an IPv6 customer has a /64."""
    if ":" not in address:
        return address
    return str(ipaddress.ip_network((address.partition("%")[0], 64), strict=False))


def read_claims(token: str, key: Any, algorithms: list[str], **expected: Any) -> dict[str, Any]:
    """The claims of a valid token; none for any other."""
    import jwt

    options: Any = {"require": ["exp"], "verify_aud": bool(expected.get("audience"))}
    try:
        return dict(jwt.decode(token, key, algorithms, options, **expected))
    except (jwt.PyJWTError, LookupError, TypeError, ValueError) as error:
        LOG.debug("a token is not good: %s", redact(str(error)))
        return {}


def read_claim(claims: dict[str, Any], name: str) -> str | None:
    """A claim by its name, or by a path such as app_metadata.team; "" where there is none, and None
    where it is unusable: an odd value must not remove anyone from a group."""
    value: Any = claims if name else None
    for key in (name,) if name in claims else name.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    text = "" if value is None else str(value)
    usable = isinstance(value, str | int | None) and len(text) <= 200 and text.isprintable()
    return text if usable else None


# ---- Ledger ------------------------------------------------------------------------------------
# One row per request: what it cost and how it ended. A thread of its own, which no slow DNS lookup
# shares, writes to SQLite in group commits; a request's last byte is sent after its row is written.

OUTCOMES = {
    "stop": "ok", "tool_calls": "ok", "length": "truncated", "content_filter": "refused",
    "failed": "error",
}  # fmt: skip


class Entry(Counts, omit_defaults=True):
    """One row. `time` is in seconds since 1970, the other times are in seconds, and `cost` is in
    USD, as text so that it stays exact. `outcome` is ok, truncated, refused, error, cancelled or
    rejected; while it is open, `cost` is what is held. `estimated` means the vendor never said its
    figures."""

    time: float
    id: str
    request_id: str = ""
    client: str = ""
    group: str = ""
    session: str = ""
    provider: str = ""
    model: str = ""
    estimated: bool = False
    cost: str | None = None
    outcome: str = "error"
    status: int = 0
    code: str = ""
    attempts: int = 0
    ttfb: float | None = None
    duration: float = 0.0
    cache: str = "bypass"


COLUMNS = Entry.__struct_fields__
NAMED, VALUES = '"{}"'.format('", "'.join(COLUMNS)), ", ".join("?" * len(COLUMNS))
INSERT = f"INSERT OR REPLACE INTO entries ({NAMED}) VALUES ({VALUES})"
SCHEMA = f"""
PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL;
CREATE TABLE IF NOT EXISTS entries ({NAMED}, PRIMARY KEY (id)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS entries_time ON entries (time);
CREATE INDEX IF NOT EXISTS entries_client ON entries (client, time);
CREATE INDEX IF NOT EXISTS entries_open ON entries (id) WHERE outcome = 'open';
CREATE TABLE IF NOT EXISTS put_off (id, message, row, PRIMARY KEY (id)) WITHOUT ROWID;
"""
GROUPS = {
    "client": "iif(client = '', '-', client)",
    "model": "iif(model = '', '-', provider || '/' || model)",
    "day": "strftime('%Y-%m-%d', time, 'unixepoch')",
}


class Totals(Struct):
    """What a group of rows adds up to; `unpriced` counts answers whose price was not known."""

    group: str = ""
    requests: int = 0
    errors: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost: Decimal = Decimal(0)
    unpriced: int = 0


def read_totals(database: Database, since: float, by: str, client: str = "") -> list[Totals]:
    query = f"""
        SELECT {GROUPS[by]} AS name, count(*), sum(outcome IN ('error', 'rejected')),
               sum(input_tokens), sum(output_tokens), coalesce(group_concat(cost, ' '), ''),
               sum(cost IS NULL AND attempts > 0)
        FROM entries WHERE time >= ? AND ? IN ('', client) GROUP BY name ORDER BY name
    """
    rows = database.execute(query, (since, client)).fetchall()
    # money is added up here, because SQLite would do it in floats
    sums = (sum(map(Decimal, row[5].split()), Decimal(0)) for row in rows)
    return [Totals(*row[:5], usd, row[6]) for row, usd in zip(rows, sums, strict=True)]  # type: ignore[call-arg]


def read_ledger(path: Path, since: float, by: str, client: str = "") -> list[Totals]:
    with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
        return read_totals(database, since, by, client)


def utc_day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(seconds))


def read_spending(database: Database, now: float) -> dict[tuple[str, str], Decimal]:
    """USD by scope and window: this month's, today's, and yesterday's, where a session may have
    begun; later ones, too, as the clock may be behind. A row still open belongs to a process that
    died, and counts as all that was held for it."""
    yesterday, month = utc_day(now - 86400), utc_day(now)[:7]
    query = """
        SELECT strftime('%Y-%m-%d', time, 'unixepoch') AS day, client, "group", session,
               sum(CAST(round(cost * 1e9) AS INTEGER)) AS billionths
        FROM entries WHERE time >= unixepoch(?) GROUP BY day, client, "group", session
        HAVING billionths > 0
    """
    try:
        with database:
            end = "outcome = 'error', code = 'proxy_died', estimated = 1"
            database.execute(f"UPDATE entries SET {end} WHERE outcome = 'open'")
            rows = database.execute(query, (min(f"{month}-01", yesterday),)).fetchall()
    except sqlite3.Error as error:
        fix = "mend it, or move it away; then every budget begins anew"
        raise ConfigError(f"ledger.path: what was spent cannot be read ({error}); {fix}") from None
    spending: dict[tuple[str, str], Decimal] = defaultdict(Decimal)
    for day, client, group, session, billionths in rows:
        scopes = ("all", f"client {client}", f"group {group}", f"session {session}")
        windows = [day[:7], day] if day >= yesterday else [day[:7]]
        for scope, window in itertools.product(scopes, windows):
            spending[scope, window] += Decimal(billionths).scaleb(-9)
    return spending


def lock_ledger(path: Path) -> Database:
    """Spending is counted in one process's memory: two on one file would spend a budget twice. The
    lock lasts until the returned connection is closed, or the process ends."""
    try:
        lock = sqlite3.connect(f"{path}.lock", timeout=0, check_same_thread=False)
        lock.execute("BEGIN EXCLUSIVE")
    except sqlite3.Error as error:
        busy = error.sqlite_errorcode == sqlite3.SQLITE_BUSY
        wrong = f"another process has {path}" if busy else f"{path}.lock: {error}"
        fix = "stop that one, or give this one another file"
        raise ConfigError(f"ledger.path: {wrong}; {fix}") from None
    return lock


def open_ledger(path: Path | None) -> Database:
    try:
        database = sqlite3.connect(path or ":memory:", check_same_thread=False)
        database.executescript(SCHEMA)
    except sqlite3.Error as error:
        raise ConfigError(f"ledger.path: {path} cannot be written ({error})") from None
    return database


class Ledger:
    """Where Redis counts what is spent, several processes may write to one file, and it keeps what
    Redis has not received; without a path only that, as long as the process lives."""

    def __init__(self, table: LedgerTable, clock: Clock, shared: bool) -> None:
        self.path = path = Path(__file__).parent / table.path if table.path else None
        self.keep, self.clock = table.keep, clock
        self.healthy = True
        self.rows: list[tuple[Any, ...]] = []
        self.unwritten = self.rows  # of a failed commit, retried with the next one
        self.thread, self.turn = ThreadPoolExecutor(1), asyncio.Lock()
        self.database = open_ledger(path)
        self.lock = lock_ledger(path) if path and not shared else io.BytesIO()

    def record(self, entry: Entry) -> Awaitable[Any]:
        """Done when the row is in the file, or at once while none can be written. Never raises: a
        full disk must not end an answer."""
        if not self.rows:
            self.group = asyncio.create_task(self.write())
        self.rows.append(astuple(entry))
        # gather(): of nothing, so it is done
        return asyncio.shield(self.group) if self.healthy else asyncio.gather()

    async def write(self) -> None:
        await asyncio.sleep(0)  # those that end in one tick share a commit, as do those that wait
        async with self.turn:
            self.unwritten, self.rows = self.unwritten + self.rows, []
            old = self.clock() - self.keep
            delete = "DELETE FROM entries WHERE time < ?"
            retry = await self.run((INSERT, self.unwritten), (delete, [(old,)]))
            self.unwritten = self.unwritten[-10_000:] if retry else []

    async def put_off(self, id: str, message: bytes, row: bytes) -> None:
        """Keep a settlement to deliver to Redis later."""
        insert = "INSERT OR REPLACE INTO put_off VALUES (?, ?, ?)"
        await self.run((insert, [(id, message, row)]))

    async def due(self) -> list[tuple[str, bytes, bytes]]:
        """Some of the settlements put off."""
        query = "SELECT * FROM put_off LIMIT 200"
        read = self.thread.submit(lambda: self.database.execute(query).fetchall())
        return await asyncio.wrap_future(read)

    async def delivered(self, ids: Iterable[str]) -> bool:
        """Take them out. Whether that was possible."""
        await self.run(("DELETE FROM put_off WHERE id = ?", [(id,) for id in ids]))
        return self.healthy

    async def run(self, *statements: tuple[str, list[tuple[Any, ...]]]) -> bool:
        with contextlib.suppress(RuntimeError):  # after close(), which writes what is left
            return await asyncio.wrap_future(self.thread.submit(self.commit, *statements))
        return False

    def commit(self, *statements: tuple[str, list[tuple[Any, ...]]]) -> bool:
        """Whether it failed and may succeed later."""
        try:
            with self.database:  # commits, or rolls back when it fails
                for statement, rows in statements:
                    self.database.executemany(statement, rows)
            if self.path and not self.path.exists():
                raise FileNotFoundError("its file was removed; a restart forgets what was spent")
            self.healthy = True
            return False
        except Exception as error:  # the disk, or a row that SQLite cannot hold
            if self.healthy:
                LOG.error("the ledger cannot be written: %s", error)
            self.healthy = False
            return isinstance(error, sqlite3.OperationalError)

    def close(self) -> None:
        self.thread.shutdown()
        self.commit((INSERT, self.unwritten + self.rows))
        self.database.close()
        self.lock.close()


# ---- Stores ------------------------------------------------------------------------------------
# State that all workers and replicas share: rates, concurrency places, money, cached answers. One
# Store has it all, so that a request needs one call before it may cost something, and one when it
# ends. MemoryStore serves one process, RedisStore any number of them. Then: the queue for a
# provider's places, and the webhook that reports budgets running out.


class Cap(Struct, frozen=True):
    """`limit` USD for what `scope` (all, a client, a group or a session) spends in `window`, a day
    or month in UTC such as 2026-11-21 or 2026-11."""

    scope: str
    window: str
    limit: Decimal

    def __str__(self) -> str:
        whose = "all clients" if self.scope == "all" else f"this {self.scope.partition(' ')[0]}"
        return f"{self.limit:f} USD for {whose} in {self.window}"

    def resets(self) -> str | None:
        """When it resets; None for a session's, which does not."""
        if self.scope.startswith("session "):
            return None
        start = datetime.date.fromisoformat(f"{self.window}-01"[:10])
        later = start + datetime.timedelta(1 if str(start) == self.window else 32)
        return f"{later if str(start) == self.window else later.replace(day=1)}T00:00:00Z"


def client_caps(client: Client, table: BudgetTable, now: float) -> list[Cap]:
    """Every cap that holds for what `client` spends at `now`, in seconds since 1970."""
    today, month = utc_day(now), utc_day(now)[:7]
    # a session over midnight keeps the budget of the day it began
    began = utc_day(client.since or now)
    whose, group = f"client {client.id}", f"group {client.group}"
    caps = [
        Cap("all", today, table.total_per_day), Cap("all", month, table.total_per_month),
        Cap(whose, today, client.per_day), Cap(whose, month, client.per_month),
        Cap(group, today, table.group_per_day), Cap(group, month, table.group_per_month),
        Cap(f"session {client.session}", began, client.per_session),
    ]  # fmt: skip
    nobody = ("group ", "session ")
    return [cap for cap in caps if cap.limit < UNLIMITED and cap.scope not in nobody]


class BudgetExceeded(ProxyError):
    def __init__(self, cap: Cap, left: Decimal) -> None:
        message = f"budget: {left.normalize():f} USD are left of {cap}, and this request "
        message += "may cost more"
        if again := cap.resets():
            message += f"; the budget is whole again at {again}"
        super().__init__(402, "budget_exceeded", message, retry=False)


Tell = Callable[[Cap, int], None]  # what hears that so many percent of a cap are spent


class Ask(Struct):
    """What a request needs before it may begin: `requests` and `tokens` of the client's rates, one
    of its places, between `least` and `most` USD of every cap, the cached answer under `key`, or
    one of `places` at `provider`. `again` means that it was admitted before, and has waited for
    another replica to fetch the same answer or needs more USD: the rates and the client's place are
    taken already, and what is held is added to what it holds. Without an `id` it needs only
    the rates. `rests` names the cooldowns to look up; `row` is its ledger row should this process
    die."""

    id: str
    client: str
    limits: Limits
    requests: int = 1
    tokens: int = 0
    caps: list[Cap] = []
    least: Decimal = Decimal(0)
    most: Decimal = Decimal(0)
    key: str = ""
    provider: str = ""
    places: int = 0
    again: bool = False
    rests: list[str] = []
    row: bytes = b""


class Admission(Struct):
    """The reply to an Ask: what is left of the client's rates, or which one is used up (`refused`)
    and the seconds to `wait`; the USD held; the cached answer, or whether another replica is
    fetching it (`pending`); whether it has a place at the provider; the seconds left of each
    cooldown. Where a cap was `exceeded`, no tokens are taken from the rates."""

    requests: float = 0.0
    tokens: float = 0.0
    refused: Literal["", "busy", "concurrent", "requests", "tokens"] = ""
    wait: float = 0.0
    held: Decimal = Decimal(0)
    answer: bytes | None = None
    pending: bool = False
    placed: bool = False
    rests: dict[str, float] = {}
    exceeded: BudgetExceeded | None = None


class Settlement(Struct):
    """How a request ended: its cost, and the tokens it did not use. `row` is its ledger row, for
    all replicas to read, b"" for none."""

    id: str
    client: str
    limits: Limits
    unused: int = 0
    usd: Decimal = Decimal(0)
    caps: list[Cap] = []
    row: bytes = b""


class Store(Protocol):
    offset: float  # seconds that the store's clock is ahead of this machine's
    pause: float  # seconds from one look for a free place to the next

    async def admit(self, ask: Ask) -> Admission:
        """Give a request all that it asks for, or say what it lacks: see Admission."""

    async def settle(self, end: Settlement) -> None:
        """Replace what was held by the true cost, and free the place at a provider. Where it
        may be told again, as its reply was lost, the second time does nothing."""

    async def spent(self, caps: list[Cap]) -> list[Decimal]:
        """USD spent or held under each of the caps."""

    def put(self, key: str, answer: bytes) -> None:
        """Cache a finished answer."""

    async def enter(self, id: str, provider: str, places: int, waiting: bool) -> bool:
        """Take one of a provider's places for a request, if one is free and nobody else waits for
        it. A request has one place at a time."""

    async def leave(self, id: str, provider: str) -> None:
        """Free it before the request ends, if it has one."""

    def rest(self, name: str, seconds: float) -> None:
        """Start the cooldown of a vendor, or of a key of ours, for all replicas."""

    async def once(self, token: str, seconds: float) -> bool:
        """Is it the first time that a token is shown? `seconds` 0 forgets it."""


class Bucket(Struct):
    """Holds up to `burst` and refills at `rate` a minute. Only a correction, or more than
    a share's burst, draws it below 0."""

    rate: float
    burst: float
    level: float
    updated: float

    def refill(self, now: float) -> float:
        self.level = min(self.burst, self.level + (now - self.updated) * self.rate / 60)
        self.updated = now
        return self.level


class Spending(Struct):
    """USD of one scope in one window; `reported` says whether reaching the cap was."""

    settled: Decimal = Decimal(0)
    held: Decimal = Decimal(0)
    reported: bool = False


class MemoryStore:
    """For one process, or for each of `share` that cannot reach Redis: then it enforces 1/`share`
    of all rates, places and caps. Spending starts from `settled`, the ledger's sums by scope and
    window. `tell` is called for each cap once at 80 % and once at 100 % spent. Only the most recent
    clients have buckets; one that was evicted starts with full ones."""

    offset, pause = 0.0, 0.005
    scopes = 50_000  # per window, at most

    def __init__(
        self, clock: Clock, tell: Tell, cache: CacheTable,
        settled: Map[tuple[str, str], Decimal] = {}, share: int = 1,
    ) -> None:  # fmt: skip
        self.clock, self.tell, self.share = clock, tell, share
        self.buckets: cachetools.LRUCache[str, tuple[Bucket, Bucket]] = cachetools.LRUCache(50_000)
        self.holds: dict[str, tuple[list[Cap], Decimal]] = {}
        self.windows: dict[str, dict[str, Spending]] = {}
        for (scope, window), usd in settled.items():
            self.windows.setdefault(window, {})[scope] = Spending(usd)
        self.answers: cachetools.TTLCache[str, bytes] = cachetools.TTLCache(
            cache.size, cache.ttl, timer=clock, getsizeof=lambda answer: len(answer) + 200
        )
        self.taken: dict[str, str] = {}  # the provider where a request has a place
        self.shown: cachetools.TTLCache[str, bool] = cachetools.TTLCache(100_000, 600, timer=clock)

    def part(self, count: int) -> int:
        return max(1, count // self.share)

    def rates(self, client: str, limits: Limits) -> tuple[Bucket, Bucket]:
        """The client's requests and its tokens."""
        now = self.clock()
        if not (buckets := self.buckets.get(client)):
            rate, burst = limits.requests_per_minute / self.share, self.part(limits.burst)
            tokens = self.part(limits.tokens_per_minute)
            requests = Bucket(rate, burst, burst, now)
            buckets = self.buckets[client] = requests, Bucket(tokens, tokens, tokens, now)
        for bucket in buckets:
            bucket.refill(now)
        return buckets

    def of(self, cap: Cap) -> Spending:
        return self.windows.get(cap.window, {}).get(cap.scope) or Spending()

    async def admit(self, ask: Ask) -> Admission:
        requests, tokens = self.rates(ask.client, ask.limits)
        kinds = ("requests", requests, ask.requests), ("tokens", tokens, ask.tokens)
        for kind, bucket, wanted in () if ask.again else kinds:
            if (lack := min(wanted, bucket.burst) - bucket.level) > 0:  # which a share may lower
                wait = lack * 60 / bucket.rate
                return Admission(requests.level, tokens.level, kind, wait)  # type: ignore[arg-type]
        requests.level -= ask.requests
        given = Admission(requests.level, tokens.level - ask.tokens)
        given.answer = self.answers.get(ask.key)
        if given.answer is None:
            if ask.caps:
                try:
                    given.held = self.hold(ask.id, ask.caps, ask.least, ask.most)
                except BudgetExceeded as exceeded:
                    given.exceeded, given.tokens = exceeded, tokens.level
                    return given
            if ask.places:
                given.placed = await self.enter(ask.id, ask.provider, ask.places, False)
        tokens.level -= ask.tokens
        return given

    def hold(self, id: str, caps: list[Cap], least: Decimal, most: Decimal) -> Decimal:
        """Hold `most` USD, or less where a cap has less left, on top of what `id` already holds,
        and return how much. Raises BudgetExceeded where that is below `least`."""
        caps = [replace(cap, limit=cap.limit / self.share) for cap in caps]
        left = [cap.limit - self.of(cap).settled - self.of(cap).held for cap in caps]
        granted = max(Decimal(0), min(most, *left))
        if granted < least:
            tightest = caps[left.index(min(left))]
            spending = self.of(tightest)
            nearly = 0 < tightest.limit * Decimal("0.8") <= spending.settled
            if nearly and not spending.reported:  # what is left is too little for what is asked
                spending.reported = True
                self.tell(tightest, 100)
            raise BudgetExceeded(tightest, granted)
        self.holds[id] = caps, granted + self.holds.get(id, (caps, Decimal(0)))[1]
        for cap in caps:
            window = self.windows.setdefault(cap.window, {})
            window.setdefault(cap.scope, Spending()).held += granted
            if len(window) > self.scopes:
                self.forget(window)
            # requests that began in the previous window may still settle; older ones are dropped
            alike = (name for name in self.windows if len(name) == len(cap.window))
            for past in sorted(name for name in alike if name < cap.window)[:-1]:
                del self.windows[past]
        return granted

    def forget(self, window: dict[str, Spending]) -> None:
        """Evict the scopes that spent least. What they spent still counts in `all`."""
        idle = [name for name in window if name != "all" and not window[name].held]
        for name in sorted(idle, key=lambda name: window[name].settled)[: self.scopes // 2]:
            del window[name]

    async def settle(self, end: Settlement) -> None:
        self.rates(end.client, end.limits)[1].level += end.unused
        caps, held = self.holds.pop(end.id, ([], Decimal(0)))
        for cap in caps:
            spending = self.of(cap)
            before, spending.settled = spending.settled, spending.settled + end.usd
            spending.held -= held
            for percent in (80, 100):
                if before < cap.limit * percent / 100 <= spending.settled and not spending.reported:
                    spending.reported = percent == 100
                    self.tell(cap, percent)
            if not (spending.settled or spending.held):  # what costs nothing is not remembered
                self.windows.get(cap.window, {}).pop(cap.scope, None)
        self.taken.pop(end.id, None)

    async def spent(self, caps: list[Cap]) -> list[Decimal]:
        return [self.of(cap).settled + self.of(cap).held for cap in caps]

    def put(self, key: str, answer: bytes) -> None:
        with contextlib.suppress(ValueError):  # larger than the whole cache
            self.answers[key] = answer

    async def enter(self, id: str, provider: str, places: int, waiting: bool) -> bool:
        if free := list(self.taken.values()).count(provider) < self.part(places):
            self.taken[id] = provider
        return free

    async def leave(self, id: str, provider: str) -> None:
        if self.taken.get(id) == provider:
            del self.taken[id]

    def rest(self, name: str, seconds: float) -> None:
        """There is no other process to tell."""

    async def once(self, token: str, seconds: float) -> bool:
        first = not self.shown.pop(known := sha256(token), False)
        if seconds:
            self.shown[known] = True
        return first


# Everything that is done in Redis, each step atomic and by Redis's clock. Every key begins with
# KEYS[1], whose hash tag puts them in one slot of a Cluster, and expires. What a request has
# (places, its hold, the lock of an answer) it has while its id is in `open`, scored by the end of
# its lease, which its process renews with every `beat`. Money is in billionths of a USD: integers,
# which stay exact (but in Lua `-x` of 0 is -0, which Redis rejects: hence `0 - held`).
# close: replaces the hold, or the charge made when the request seemed dead, by the true cost. An
# unknown cost counts as all that was held, until the request itself is settled.
# settle: what has no row cost nothing; then `ended` only outlives an admit still on its way.
# put: the cache is bounded here, because what Redis evicts by itself could be money.
SCRIPT = """
local time = redis.call('TIME')
local now, day, run = time[1] + time[2] / 1000000, 86400, {}
local function num(value) return tonumber(value) or 0 end
local function call(command, key, ...) return redis.call(command, KEYS[1] .. key, ...) end
local function write(seconds, command, key, ...) -- every key expires
  local result = call(command, key, ...)
  call('EXPIRE', key, math.ceil(seconds))
  return result
end
local function give(id, ...)
  write(40 * day, 'HSET', 'open:' .. id, ...)
  write(40 * day, 'ZADD', 'open', now + LEASE, id)
end
local function ended(id) return call('EXISTS', 'ended:' .. id) == 1 end
local function free(id)
  local provider = call('HGET', 'open:' .. id, 'place')
  if not provider then return end
  call('SREM', 'places:' .. provider, id)
  call('HDEL', 'open:' .. id, 'place')
end
local function charge(cap, settled, held)
  call('HINCRBY', 'money:' .. cap.name, 'held', held)
  return write(cap.ttl, 'HINCRBY', 'money:' .. cap.name, 'settled', settled)
end
local function use(day_of, client, sums)
  local key = 'used:' .. day_of .. ':' .. client
  for name, value in pairs(sums) do write(2 * day, 'HINCRBY', key, name, value) end
end
local function append(row) write(KEEP, 'XADD', 'rows', 'MAXLEN', '~', ROWS, '*', 'row', row) end
local function spent(cap)
  local sums = call('HMGET', 'money:' .. cap.name, 'settled', 'held')
  return num(sums[1]) + num(sums[2]), num(sums[1])
end
local function hold(ask)
  local least, tightest = math.huge
  for _, cap in ipairs(ask.caps) do
    local left = cap.limit - spent(cap)
    if left < least then least, tightest = left, cap end
  end
  local granted = math.max(0, math.min(ask.most, least))
  if granted < ask.least then -- what is left is too little for what is asked
    local _, settled = spent(tightest)
    local nearly = tightest.limit > 0 and settled >= tightest.limit * 0.8
    local tell = nearly and call('HSETNX', 'money:' .. tightest.name, 'told', 1) == 1
    return {usd = granted, exceeded = tightest, tell = tell}
  end
  for _, cap in ipairs(ask.caps) do charge(cap, 0, granted) end
  local held = num(call('HGET', 'open:' .. ask.id, 'held')) + granted
  give(ask.id, 'held', held, 'caps', cjson.encode(ask.caps))
  return {usd = granted}
end

local function close(id, cost, caps, told)
  local has = call('HMGET', 'open:' .. id, 'client', 'caps', 'held', 'charged')
  local held, charged = num(has[3]), num(has[4])
  local change = (cost or held + charged) - charged
  for _, cap in ipairs(has[2] and cjson.decode(has[2]) or caps) do
    if held == 0 and change == 0 then break end -- what costs nothing is not remembered
    local sum, key = charge(cap, change, 0 - held), 'money:' .. cap.name
    for _, percent in ipairs({80, 100}) do
      local mark = cap.limit * percent / 100
      if sum - change < mark and mark <= sum and call('HEXISTS', key, 'told') == 0
         and call('HSETNX', key, 'at' .. percent, 1) == 1 then
        if percent == 100 then call('HSET', key, 'told', 1) end
        table.insert(told, {cap, percent})
      elseif sum < mark then
        call('HDEL', key, 'at' .. percent, percent == 80 and 'told' or 'at100')
      end
    end
  end
  free(id)
  call('ZREM', 'open', id)
  call('SREM', 'live:' .. (has[1] or ''), id)
  return charged + change
end

function run.enter(id, provider, places, waiting)
  local wanted, places_of = 'wanted:' .. provider, 'places:' .. provider
  if ended(id) then return 0 end
  if waiting == '1' and call('SISMEMBER', places_of, id) == 1 then return 1 end -- reply lost
  if call('SCARD', places_of) < tonumber(places) and
     (waiting == '1' or call('EXISTS', wanted) == 0) then
    free(id) -- its leave of another may come later
    write(40 * day, 'SADD', places_of, id)
    give(id, 'place', provider)
    return 1
  end
  if waiting == '1' then call('SET', wanted, 1, 'PX', 1500) end
  return 0
end

function run.leave(id, provider)
  if call('HGET', 'open:' .. id, 'place') == provider then free(id) end
end

function run.admit(text, row)
  local ask, given, held = cjson.decode(text), {rests = {}}, {usd = 0}
  local rate, live = 'rate:' .. ask.client, 'live:' .. ask.client
  local level = call('HMGET', rate, 'requests', 'tokens', 'time')
  local minutes = math.max(0, now - (tonumber(level[3]) or now)) / 60
  local requests = math.min(ask.burst, (tonumber(level[1]) or ask.burst) + minutes * ask.rate)
  local tokens = math.min(ask.tpm, (tonumber(level[2]) or ask.tpm) + minutes * ask.tpm)
  given.requests, given.tokens = requests, tokens
  if ended(ask.id) then given.refused = 'busy' -- after its settle
  elseif not ask.again then
    local wanted = ask.id ~= '' -- else it takes no place
    if wanted and call('ZCARD', 'open') >= ask.total then given.refused = 'busy'
    elseif wanted and call('SCARD', live) >= ask.concurrent then given.refused = 'concurrent'
    elseif requests < ask.requests then
      given.refused, given.wait = 'requests', (ask.requests - requests) * 60 / ask.rate
    elseif tokens < ask.tokens then
      given.refused, given.wait = 'tokens', (ask.tokens - tokens) * 60 / ask.tpm
    end
  end
  if given.refused then return {cjson.encode(given), cjson.encode(held), false} end
  if not ask.again then
    given.requests, given.tokens = requests - ask.requests, tokens - ask.tokens
  end
  local keeps = ask.key ~= ''
  local fresh = keeps and num(call('ZSCORE', 'answers:time', ask.key)) > now - TTL
  local answer = fresh and call('HGET', 'answers', ask.key)
  local leader = keeps and not answer and call('GET', 'lock:' .. ask.key)
  given.pending = leader and call('ZSCORE', 'open', leader) and true or false
  if not answer and not given.pending then
    if #ask.caps > 0 then held = hold(ask) end
    if held.exceeded then given.tokens = tokens
    else
      if keeps then call('SET', 'lock:' .. ask.key, ask.id, 'EX', 3600) end
      given.placed = ask.places > 0 and run.enter(ask.id, ask.provider, ask.places) == 1
    end
  end
  call('HSET', rate, 'requests', given.requests, 'tokens', given.tokens, 'time', now)
  local full = math.max((ask.burst - given.requests) / ask.rate, 1 - given.tokens / ask.tpm)
  call('EXPIRE', rate, math.ceil(full * 60) + 60)
  if ask.id ~= '' and not ask.again and not held.exceeded then
    write(40 * day, 'SADD', live, ask.id)
    give(ask.id, 'client', ask.client, 'row', row, 'day', ask.day, 'lock', 'lock:' .. ask.key)
  end
  for _, name in ipairs(ask.rests) do
    local left = call('PTTL', 'rest:' .. name)
    if left > 0 then given.rests[name] = left / 1000 end
  end
  return {cjson.encode(given), cjson.encode(held), answer}
end

function run.settle(text, row)
  local done, told = cjson.decode(text), {}
  local open, rate = 'open:' .. done.id, 'rate:' .. done.client
  local mark, seconds = 'ended:' .. done.id, row == '' and 60 or 3600
  local lost = call('GET', mark) -- it comes again, as the reply did not arrive
  if lost then call('SET', mark, '{}', 'EX', seconds) return lost end
  if done.asked and now - done.time > seconds and call('EXISTS', open) == 0 then return '{}' end
  if call('HEXISTS', open, 'client') == 1 and done.unused ~= 0 then
    if call('HSETNX', rate, 'tokens', done.tpm) == 1 then -- it was full, and so expired
      write(3600, 'HSET', rate, 'time', now)
    end
    local level = tonumber(call('HINCRBYFLOAT', rate, 'tokens', done.unused))
    local full = math.ceil((1 - level / done.tpm) * 60) + 60 -- a debt must not expire
    if call('TTL', rate) < full then call('EXPIRE', rate, full) end
  end
  local charged, lock = call('HGET', open, 'charged'), call('HGET', open, 'lock')
  if lock and call('GET', lock) == done.id then call('DEL', lock) end
  close(done.id, done.usd, done.caps, told)
  call('DEL', open)
  if row ~= '' then
    append(row)
    local entry, sums = cjson.decode(row), {requests = charged and 0 or 1}
    sums.cost, sums.input_tokens = done.usd - num(charged), entry.input_tokens
    sums.output_tokens = entry.output_tokens
    use(done.day, done.client, sums)
  end
  local reply = cjson.encode(told)
  call('SET', mark, reply, 'EX', seconds)
  return reply
end

function run.beat(ids, lease)
  for _, id in ipairs(cjson.decode(ids)) do call('ZADD', 'open', 'XX', now + lease, id) end
  if now - num(call('GET', 'alive')) > LEASE / 2 then -- Redis was down, not the processes
    call('SET', 'spared', 1, 'PX', math.ceil(LEASE * 1000))
  end
  local told, most = {}, call('EXISTS', 'spared') == 1 and 0 or 500
  for _, id in ipairs(call('ZRANGEBYSCORE', 'open', '-inf', now, 'LIMIT', 0, most)) do
    local open, cost = 'open:' .. id, close(id, nil, {}, told)
    local has = call('HMGET', open, 'row', 'client', 'day')
    write(day, 'HSET', open, 'held', 0, 'charged', cost)
    if has[1] and has[1] ~= '' then
      local row = cjson.decode(has[1])
      row.cost = string.format('%.9f', cost / 1000000000)
      append(cjson.encode(row))
      if has[3] then use(has[3], has[2], {requests = 1, cost = cost}) end
    end
  end
  local info = redis.pcall('INFO', 'memory') -- which not every Redis allows
  local policy = type(info) == 'string' and string.match(info, 'maxmemory_policy:(%S+)')
  write(60, 'SET', 'alive', now) -- one that takes no writes is as good as away
  return {time[1], time[2], policy or '', cjson.encode(told)}
end

function run.spent(caps)
  local sums = {}
  for i, cap in ipairs(cjson.decode(caps)) do sums[i] = string.format('%.0f', spent(cap)) end
  return sums
end

function run.put(key, answer)
  local function drop(old)
    call('DECRBY', 'answers:size', call('HSTRLEN', 'answers', old) + 200)
    call('HDEL', 'answers', old)
    call('ZREM', 'answers:time', old)
  end
  if #answer + 200 > SIZE then return end
  if call('HEXISTS', 'answers', key) == 1 then drop(key) end
  write(TTL, 'HSET', 'answers', key, answer)
  write(TTL, 'ZADD', 'answers:time', now, key)
  local size = write(TTL, 'INCRBY', 'answers:size', #answer + 200)
  while size > SIZE do
    drop(call('ZRANGE', 'answers:time', 0, 0)[1])
    size = num(call('GET', 'answers:size'))
  end
end

function run.rest(name, ms)
  if call('PTTL', 'rest:' .. name) < tonumber(ms) then call('SET', 'rest:' .. name, 1, 'PX', ms) end
end

function run.once(token, ms)
  if ms == '0' then return call('DEL', 'shown:' .. token) end
  return call('SET', 'shown:' .. token, 1, 'NX', 'PX', ms) and 1 or 0
end

function run.used(whose) return call('HGETALL', 'used:' .. whose) end

return run[ARGV[1]](unpack(ARGV, 2))
"""


class StoreAway(ProxyError):
    """Redis has not answered: what needs it is refused, or does without it."""

    def __init__(self, message: str = "what all replicas share cannot be reached") -> None:
        super().__init__(503, "store_unavailable", f"{message}; try again", after=2)


Step = tuple[tuple[Any, ...], asyncio.Future[Any]]  # of the script: its arguments, its reply


class Link:
    """This process's connection to Redis. Up to 100 calls made in the same tick share a pipeline,
    and so a round trip. While Redis is down they fail at once: `up` is True only after a heartbeat
    has succeeded."""

    patience, step = 11, 0.02  # an answer's timeout in steps, seconds of a step
    up: bool | None = None  # False: it is down, and that is logged; None: not tried yet
    sender: asyncio.Task[None] | None = None
    cluster = False  # once a node of one has sent us on

    def __init__(self, config: Config) -> None:
        table, cache = config.redis, config.cache
        self.url, self.prefix = table.url, f"{{{table.namespace}}}:"
        self.redis = connect_redis(table.url)
        numbers = f"{table.lease:g}, {table.rows}, {config.ledger.keep:.0f}"
        numbers += f", {cache.ttl:g}, {cache.size:d}"
        self.script = f"local LEASE, ROWS, KEEP, TTL, SIZE = {numbers}\n{SCRIPT}"
        self.sha = hashlib.sha1(self.script.encode()).hexdigest()
        self.queue: list[Step] = []
        self.batch = self.queue

    async def run(self, *args: Any) -> Any:
        """What a step of the script returns. Raises StoreAway after `patience` without an answer;
        in a crowd, each hundred before it may take as long."""
        if not self.up and args[0] != "beat":
            raise StoreAway
        answer = asyncio.get_running_loop().create_future()
        self.queue.append((args, answer))
        if self.sender is None:
            self.sender = asyncio.create_task(self.send())
        reply = await answer
        if isinstance(reply, Exception):
            if self.up is not False:  # else the log has it
                LOG.error("redis: %s failed (%s)", args[0], redact(str(reply)))
            raise StoreAway("what all replicas share cannot be changed")
        return reply

    async def send(self) -> None:
        steps, crowd = 0, False
        try:
            while self.queue:
                self.batch, self.queue = self.queue[:100], self.queue[100:]
                # the batch may have waited that long for the one before; but a crowd takes a while
                earlier, steps = steps if not crowd else 0, 0
                crowd, most = bool(self.queue), self.patience if self.up else 100
                work = asyncio.create_task(self.execute(self.batch))
                try:  # a process that is too busy to read the answer counts fewer steps
                    while not (await asyncio.wait((work,), timeout=self.step))[0]:
                        steps += 1
                        if earlier + steps >= most:
                            raise TimeoutError(f"no answer in {most * self.step:g} s")
                    work.result()
                finally:
                    work.cancel()
            self.sender = None
        except Exception as error:
            self.fall(redact(repr(error)))

    async def execute(self, batch: list[Step], whole: bool = False) -> None:
        """Run the steps, naming the script by its hash or sending the `whole` of it."""
        from redis import exceptions

        if self.up is False:  # its name may now lead to another server
            await self.redis.aclose()
        pipeline = self.redis.pipeline(transaction=False)
        for args, _ in batch:
            script = ("EVAL", self.script) if whole else ("EVALSHA", self.sha)
            pipeline.execute_command(*script, 1, self.prefix, *args)
        # while a Cluster moves our keys, a step must not run where they are not yet
        stay = {"allow_redirections": False} if self.cluster else {}
        moved, unknown = list[Step](), list[Step]()
        for step, reply in zip(batch, await pipeline.execute(False, **stay), strict=True):
            if isinstance(reply, exceptions.ConnectionError | exceptions.TimeoutError):
                raise reply
            if isinstance(reply, exceptions.MovedError):
                moved.append(step)
            elif isinstance(reply, exceptions.NoScriptError):  # it was restarted, or flushed
                unknown.append(step)
            elif not step[1].done():  # else whoever asked has left
                step[1].set_result(reply)
        if moved:  # this is one node of a Cluster, or our keys are at another one now
            await self.redis.aclose()
            self.redis, self.cluster = connect_redis(self.url, cluster=True), True
            await self.execute(moved, whole)
        if unknown:
            await self.execute(unknown[:1], whole=True)
            await self.execute(unknown[1:])

    def fall(self, reason: str) -> None:
        """Fail all pending calls, and new ones until Redis is back."""
        if self.up is not False:
            LOG.error("redis is away: %s", reason)
        for _, answer in self.batch + self.queue:
            if not answer.done():
                answer.set_exception(StoreAway())
        if self.sender:
            self.sender.cancel()
        self.up, self.queue, self.sender = False, [], None


def connect_redis(url: str, cluster: bool = False) -> Any:
    """A client without retries, as callers want to fail fast (a Cluster's has some, which the
    timeout of Link ends). Raises ConfigError."""
    redis = load_optional("redis.url", "redis", "redis.asyncio")
    kind = redis.RedisCluster if cluster else redis.Redis
    times = {"socket_connect_timeout": 2, "socket_timeout": 5}
    try:
        return kind.from_url(url, retry=None, protocol=2, **times)
    except ValueError:  # which may show the password
        wanted = "must look like redis://:PASSWORD@HOST:6379/0, or rediss:// for TLS"
        raise ConfigError(f"redis.url: {wanted}; write a / in the password as %2F") from None


def billionths(usd: Decimal) -> int:
    return math.ceil(usd * 10**9)


def to_redis(caps: Iterable[Cap]) -> list[dict[str, Any]]:
    return [
        {"name": f"{cap.window}:{sha256(cap.scope)[:32]}", "limit": billionths(cap.limit),
         "ttl": (3 if len(cap.window) == 10 else 40) * 86400,
         "scope": cap.scope, "window": cap.window}
        for cap in caps
    ]  # fmt: skip


def from_redis(cap: dict[str, Any]) -> Cap:
    return Cap(cap["scope"], cap["window"], Decimal(cap["limit"]).scaleb(-9).normalize())


class RedisStore:
    """For any number of processes. While Redis is down, each enforces its share of the rates and,
    if so configured, of the budgets in memory; settlements are put off into the ledger, and
    delivered when Redis is back. A request admitted in memory stays there."""

    offset, pause, evicts = 0.0, 0.05, False
    largest = 2**20  # bytes of an answer: a larger one would delay all others

    def __init__(self, config: Config, tell: Tell, ledger: Ledger) -> None:
        self.table, self.tell, self.ledger = config.redis, tell, ledger
        self.link, self.tasks = Link(config), set[asyncio.Task[Any]]()
        share = config.redis.replicas * config.server.workers
        self.local = MemoryStore(time.monotonic, tell, config.cache, share=share)
        self.alone: set[str] = set()  # requests that were admitted without Redis
        self.asked: set[str] = set()  # those that Redis may know of

    async def open(self) -> None:
        await self.beat(self.table.lease)
        self.post(self.live())

    def post(self, work: Awaitable[Any]) -> None:
        """Run it in the background. While Redis is down it is lost."""

        async def quietly() -> None:
            with contextlib.suppress(StoreAway):
                await work

        task = asyncio.create_task(quietly())
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def live(self) -> None:
        """Send heartbeats, and deliver what was put off, until cancelled."""
        while True:
            await asyncio.sleep(min(1, self.table.lease / 4) if self.link.up else 0.25)
            await self.beat(self.table.lease)
            with contextlib.suppress(Exception):  # heartbeats matter more
                while self.link.up and (due := await self.ledger.due()):
                    await asyncio.gather(*(self.deliver(message, row) for _, message, row in due))
                    if not await self.ledger.delivered(id for id, _, _ in due):
                        break  # a full disk keeps them: not again at once
                    await self.beat(self.table.lease)  # there may be many of them

    async def beat(self, lease: float) -> None:
        """Renew the leases of all requests running here, in seconds."""
        link, ids = self.link, msgspec.json.encode(self.asked)
        try:
            seconds, micros, policy, reports = await link.run("beat", ids, lease)
        except StoreAway as away:  # it may be there, but take no writes
            return link.fall(away.message)
        self.offset = int(seconds) + int(micros) / 1e6 - self.ledger.clock()
        evicts = policy not in (b"noeviction", b"")
        if not policy and not link.up:
            LOG.warning("redis: does not tell its maxmemory-policy; it must be noeviction")
        if evicts and not self.evicts:
            fix = "so budgets are closed; set it to noeviction"
            LOG.error("redis: its maxmemory-policy may evict what was spent, %s", fix)
        if link.up is False:
            LOG.info("redis is there")
        link.up, self.evicts = True, evicts
        self.tell_all(reports)

    def tell_all(self, reports: bytes) -> None:
        for cap, percent in msgspec.json.decode(reports):
            self.tell(from_redis(cap), percent)

    async def close(self) -> None:
        """End the leases, so that nobody waits for them."""
        if self.link.up:
            await self.beat(0)
        for task in self.tasks:
            task.cancel()
        await self.link.redis.aclose()

    def is_there(self, capped: bool) -> bool:
        return self.link.up is True and not (capped and self.evicts)

    def is_needed(self, capped: bool) -> bool:
        table = self.table
        return table.limits_when_away == "closed" or (capped and table.budget_when_away == "closed")

    def serving(self, capped: bool) -> bool:
        """Can requests be admitted? `capped` says whether there are budgets."""
        return self.is_there(capped) or not self.is_needed(capped)

    async def admit(self, ask: Ask) -> Admission:
        limits, capped = ask.limits, bool(ask.caps)
        wanted = {
            "id": ask.id, "client": sha256(ask.client)[:32],
            "requests": ask.requests, "tokens": ask.tokens, "rate": limits.requests_per_minute,
            "burst": limits.burst, "tpm": limits.tokens_per_minute,
            "concurrent": limits.concurrent, "total": limits.concurrent_total,
            "caps": to_redis(ask.caps), "least": billionths(ask.least),
            "most": billionths(ask.most), "key": ask.key, "provider": ask.provider,
            "places": ask.places, "again": ask.again, "rests": ask.rests, "day": self.today(),
        }  # fmt: skip
        try:
            if ask.id in self.alone or not self.is_there(capped):
                raise StoreAway
            self.asked |= {ask.id} - {""}
            data, held, answer = await self.link.run("admit", msgspec.json.encode(wanted), ask.row)
        except StoreAway:
            if self.is_needed(capped):
                raise
            self.alone |= {ask.id} - {""}
            return await self.local.admit(ask)
        given = msgspec.json.decode(data, type=Admission)
        given.answer = answer
        if given.placed:  # also counted here, should Redis go down
            self.local.taken[ask.id] = ask.provider
        hold = msgspec.json.decode(held)
        usd = Decimal(hold["usd"]).scaleb(-9)
        if "exceeded" not in hold:
            given.held = usd
            return given
        cap = from_redis(hold["exceeded"])
        given.exceeded = BudgetExceeded(cap, usd)
        if hold["tell"]:
            self.tell(cap, 100)
        return given

    async def settle(self, end: Settlement) -> None:
        alone, asked = end.id in self.alone, end.id in self.asked
        self.alone.discard(end.id)
        self.asked.discard(end.id)
        if alone:
            await self.local.settle(end)
        self.local.taken.pop(end.id, None)
        message = msgspec.json.encode({
            "id": end.id, "client": sha256(end.client)[:32], "tpm": end.limits.tokens_per_minute,
            "unused": end.unused, "usd": billionths(end.usd),
            "caps": to_redis(end.caps), "day": self.today(), "asked": asked and not alone,
            "time": self.ledger.clock() + self.offset,
        })  # fmt: skip
        await asyncio.sleep(0)  # so that the answer just put is sent first: others look for it
        try:
            await self.deliver(message, end.row)
        except StoreAway:
            if asked or end.usd or end.row:  # else a flood of rejected requests fills the disk
                await self.ledger.put_off(end.id, message, end.row)

    async def deliver(self, message: bytes, row: bytes) -> None:
        self.tell_all(await self.link.run("settle", message, row))

    async def spent(self, caps: list[Cap]) -> list[Decimal]:
        sums = await self.link.run("spent", msgspec.json.encode(to_redis(caps)))
        return [Decimal(int(usd)).scaleb(-9) for usd in sums]

    def put(self, key: str, answer: bytes) -> None:
        if len(answer) <= self.largest:
            self.post(self.link.run("put", key, answer))

    async def enter(self, id: str, provider: str, places: int, waiting: bool) -> bool:
        try:
            if id in self.alone:
                raise StoreAway
            placed = bool(await self.link.run("enter", id, provider, places, int(waiting)))
            self.local.taken |= {id: provider} if placed else {}
            return placed
        except StoreAway:
            return await self.local.enter(id, provider, places, waiting)

    async def leave(self, id: str, provider: str) -> None:
        await self.local.leave(id, provider)
        self.post(self.link.run("leave", id, provider))

    def rest(self, name: str, seconds: float) -> None:
        self.post(self.link.run("rest", name, math.ceil(seconds * 1000)))

    async def once(self, token: str, seconds: float) -> bool:
        return bool(await self.link.run("once", sha256(token), int(seconds * 1000)))

    async def used(self, client: str) -> Totals:
        """What a client has used today, at all replicas."""
        fields = await self.link.run("used", f"{self.today()}:{sha256(client)[:32]}")
        used = {fields[i].decode(): int(fields[i + 1]) for i in range(0, len(fields), 2)}
        cost = Decimal(used.pop("cost", 0)).scaleb(-9)
        return Totals(**used, cost=cost)  # type: ignore[arg-type]

    def today(self) -> str:
        return utc_day(self.ledger.clock() + self.offset)


class Line:
    """The queue for places at a provider. Clients take turns, so that one with a hundred requests
    delays itself and not the others."""

    calling: asyncio.Task[None] | None = None
    closed = False

    def __init__(self, store: Store, name: str, provider: Provider) -> None:
        self.store, self.name = store, name
        self.places, self.limit = provider.max_concurrent or 0, provider.queue_limit
        self.turns: dict[str, dict[str, asyncio.Future[None]]] = {}  # by client, then by request

    def waiting(self) -> int:
        return sum(map(len, self.turns.values()))

    async def enter(self, id: str, client: str, patience: float) -> None:
        """Take a place for a client's request. Raises 503 where too many wait, or it takes too
        long, or the server stops."""
        if not self.turns and await self.store.enter(id, self.name, self.places, False):
            return
        if self.closed:
            raise Stopping
        if self.waiting() >= self.limit:
            message = f"too many are waiting for {self.name}; try again"
            raise ProxyError(503, "queue_full", message, after=5)
        turn = asyncio.get_running_loop().create_future()
        self.turns.setdefault(client, {})[id] = turn
        if self.calling is None:
            self.calling = asyncio.create_task(self.call())
        try:
            async with asyncio.timeout(patience):
                await turn
        except BaseException as error:
            self.drop(client, id)
            await self.store.leave(id, self.name)  # it may have got the place in this very moment
            if not isinstance(error, TimeoutError):
                raise
            message = f"no place at {self.name} came free in time; try again"
            raise ProxyError(503, "queue_timeout", message, after=5) from None

    def drop(self, client: str, id: str) -> None:
        waiting = self.turns.get(client, {})
        if waiting.pop(id, None) and not waiting:
            del self.turns[client]

    async def call(self) -> None:
        """Give places to those who wait, as they come free."""
        try:
            while self.turns:
                client = next(iter(self.turns))
                id, turn = next(iter(self.turns[client].items()))
                if turn.done():  # it has left
                    self.drop(client, id)
                elif not await self.store.enter(id, self.name, self.places, True):
                    await asyncio.sleep(self.store.pause)
                elif turn.done():  # it has left meanwhile
                    await self.store.leave(id, self.name)
                else:
                    turn.set_result(None)
                    self.turns[client] = self.turns.pop(client)  # behind all the others now
                    self.drop(client, id)
        finally:
            self.calling = None

    def close(self) -> None:
        """Fail all who wait: when the server stops, no place may come free in time."""
        self.closed = True
        for turn in itertools.chain(*(waiting.values() for waiting in self.turns.values())):
            if not turn.done():
                turn.set_exception(Stopping())


class Webhook:
    """Reports caps (nearly) used up to `budget.webhook`, signed as standardwebhooks.com has it. It
    delays no request: what it cannot deliver in a minute is only in the log."""

    def __init__(self, url: str, secret: str) -> None:
        self.url, self.secret = url, secret.encode()
        self.queue: asyncio.PriorityQueue[tuple[bool, int, bytes]] = asyncio.PriorityQueue()
        self.numbers = itertools.count()

    def tell(self, cap: Cap, percent: int) -> None:
        event = {"percent": percent, "scope": cap.scope, "window": cap.window}
        event |= {"limitUsd": float(cap.limit), "resetsAt": cap.resets()}
        LOG.warning("budget %s", event)
        behind = cap.scope != "all"  # strangers may have many addresses
        if self.url and behind and self.queue.qsize() >= 100:
            LOG.warning("budget.webhook: not delivered (too many wait)")
        elif self.url:
            body = msgspec.json.encode({"type": "budget", "data": event})
            self.queue.put_nowait((behind, next(self.numbers), body))

    async def run(self, http: httpx.AsyncClient) -> None:
        while True:
            _, _, body = await self.queue.get()
            id = f"msg_{sha256(body.decode())[:24]}"  # the same, should it be told again
            for wait in (0, 1, 3, 10, 30):
                await asyncio.sleep(wait)
                now = str(int(time.time()))
                signed = b"%b.%b.%b" % (id.encode(), now.encode(), body)
                digest = base64.b64encode(hmac.digest(self.secret, signed, "sha256")).decode()
                headers = {"content-type": "application/json", "webhook-id": id}
                headers |= {"webhook-timestamp": now, "webhook-signature": f"v1,{digest}"}
                try:
                    sent = http.stream("POST", self.url, content=body, headers=headers)
                    async with asyncio.timeout(5), sent as reply:  # whose body may have no end
                        if reply.is_success:
                            break
                        why = f"status {reply.status_code}"
                except Exception as error:  # whatever it is, the next one may get through
                    why = type(error).__name__
                LOG.warning("budget.webhook: not delivered (%s)", why)  # its URL may be a secret


# ---- Flights -----------------------------------------------------------------------------------
# Upstream calls that several identical requests share while they run. A finished answer is kept, if
# the cache is on, as the batches it arrived in, so that a replay has the same pieces.


class Account(Struct):
    """What one upstream call used, over all its attempts: `produced`, the bytes of text the vendor
    sent; `bound`, the most tokens its input can be billed as; `lost`, the USD that failed attempts
    may have cost; `hidden`, whether output may be billed that was not sent as text; `hour`, whether
    it asks for a one-hour cache; `batches`, the answer itself, where others may want it too."""

    provider: str = ""
    model: str = ""
    attempts: int = 0
    seconds: float = 0.0
    billed: bool = False
    usage: Usage = field(default_factory=Usage)
    produced: int = 0
    bound: int = 0
    hidden: bool = False
    hour: bool = False
    lost: Decimal = Decimal(0)
    dropped: list[str] = []
    headers: dict[str, str] = {}
    batches: list[Batch] = []


class Flight:
    """One upstream call and the requests that read its batches. It is cancelled when the last of
    them leaves, and not before."""

    error: Exception | None = None
    readers = 0

    def __init__(self, source: Batches, account: Account) -> None:
        self.account, self.changed = account, asyncio.Event()
        self.task = asyncio.create_task(self.run(source))

    async def run(self, source: Batches) -> None:
        try:
            async with aclosing(source):
                async for batch in source:
                    self.account.batches.append(batch)
                    self.wake()
        except Exception as error:  # for its readers
            self.error = error
            self.wake()

    def leave(self) -> None:
        """One reader less; without any, the call is cancelled a tick later: one may be joining."""
        self.readers -= 1
        asyncio.get_running_loop().call_soon(lambda: self.readers or self.task.cancel())

    def wake(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()

    async def read(self) -> Batches:
        """Its batches, from the first one; whoever has read the last one leaves."""
        self.readers += 1
        try:
            for position in itertools.count():
                while position == len(self.account.batches):
                    if self.error:
                        raise self.error
                    await self.changed.wait()
                yield self.account.batches[position]
        finally:
            self.leave()


# ---- SSE ---------------------------------------------------------------------------------------
# Bytes in, events out, split at CR, LF or CRLF as the standard has it, wherever the network cut
# them. An event counts only with the blank line that ends it.


CR, BACKSLASH = b"\r\\"  # as numbers, which are quicker to look for


class SSE:
    LIMIT = 32 * 2**20  # of one event: more than any vendor sends, and an end to garbage
    # a CR that ends what has come may be half of a CRLF
    END = re.compile(rb"\r\r|\n(?:\r?\n|\r(?=[^\n]))")
    buffer = b""

    def feed(self, chunk: bytes) -> list[bytes]:
        """The events that `chunk` completes, as they came."""
        if not self.buffer and 0 <= chunk.find(b"\n\n") == len(chunk) - 2 and CR not in chunk:
            return [chunk]  # most often it is one event, and this is quicker
        seen, self.buffer = max(0, len(self.buffer) - 2), self.buffer + chunk
        ends = [0, *(end.end() for end in self.END.finditer(self.buffer, seen))]
        events = [self.buffer[start:end] for start, end in itertools.pairwise(ends)]
        self.buffer = self.buffer[ends[-1] :]
        if len(self.buffer) > self.LIMIT:
            raise UpstreamError(502, "an event of the vendor's stream is too large")
        return events


def event_data(event: bytes) -> bytes:
    lines = event.removeprefix(b"\xef\xbb\xbf").splitlines()
    return b"\n".join([line[5:] for line in lines if line[:5] == b"data:"]).strip()


# ---- Adapters ----------------------------------------------------------------------------------
# One class a wire dialect, one object an upstream call: encode() writes the request, feed() reads
# the answer. No I/O. A vendor that speaks a known dialect is a config block; a new dialect is one
# class here, and its name in ADAPTERS, SPEAKS and the pattern of Provider.adapter.

# What models accept, so that a parameter is dropped and reported instead of a 400. The first line
# with a matching pattern counts. Anthropic: `one` of temperature and top_p, or neither
# (`unsampled`); thinking by `budget` or `adaptive`; no forced tool (`unforced`) or prefill
# (`unfilled`); system text `mid` conversation. OpenAI: `only` in Responses, or no tools in Chat
# (`elsewhere`). Both: reasons `always`, by default (`on`), on request (`off`) or never (`plain`).
# Others: reason by default, which Chat does not show (`unseen`).
CAPABILITIES = """
one: claude-3*
one budget: claude-*-4-[015]* claude-*-4-20*
adaptive unfilled: claude-*-4-6*
unsampled adaptive unfilled: claude-opus-4-7*
unsampled adaptive unfilled always: claude-mythos-preview*
unsampled adaptive unfilled mid: claude-opus-4-8*
unsampled adaptive unfilled mid on: claude-haiku-5-5*
unsampled adaptive unfilled mid unforced always: claude-*-5-[15]*
unsampled adaptive unfilled mid always: claude-fable-5 claude-fable-5-20* claude-mythos-5*
unsampled adaptive unfilled mid on: claude-*-5 claude-*-5-20*
unsampled adaptive unfilled unforced always: claude-*
always elsewhere: gpt-6-astra* gpt-6.1-sol*
always only: gpt-5*-pro gpt-5*-pro-20* gpt-5-codex* gpt-5.[12]-codex* *daybreak*
always only: o[1-9]*-pro o[1-9]*-pro-20* o[1-9]*-deep-research*
off only: gpt-5.3-codex*
always: gpt-6-rosalind* gpt-5*-chat* gpt-5*-cyber*
on: gpt-6* gpt-5.[5-9]*
off: gpt-5.[1-9]*
always: gpt-5* o[1-9]* chat-latest
plain: gpt-[34]*
budget unseen: gemini-2.5* gemini-[3-9]* grok-[4-9]* grok-3-mini*
budget: *
"""
# Vendors' finish reasons other than a plain stop, and ours; OpenAI's for tool calls needs none.
REASONS: dict[Any, str] = {
    "max_tokens": "length", "max_output_tokens": "length", "length": "length",
    "model_context_window_exceeded": "length", "refusal": "content_filter",
    "content_filter": "content_filter", "tool_use": "tool_calls",
    "model_length": "length", "sensitive": "content_filter",  # Mistral's and Z.ai's
}  # fmt: skip
# Finish reasons that mean a failure, also DeepSeek's and Z.ai's.
BROKEN = ("error", "network_error", "insufficient_system_resource")


# The vendors' names of our usage figures, at the top or one level down, where the same name at the
# top wins. Of several names of one figure, the largest counts.
FIGURES = {
    "input_tokens": "input_tokens", "prompt_tokens": "input_tokens",
    "output_tokens": "output_tokens", "completion_tokens": "output_tokens",
    "cache_read_input_tokens": "cache_read_tokens", "cached_tokens": "cache_read_tokens",
    "cache_creation_input_tokens": "cache_write_tokens", "cache_write_tokens": "cache_write_tokens",
    "ephemeral_1h_input_tokens": "cache_write_1h_tokens", "web_search_requests": "web_searches",
    "thinking_tokens": "reasoning_tokens", "reasoning_tokens": "reasoning_tokens",
}  # fmt: skip

UNTHINKING = ({"type": "disabled"}, {"effort": "none"}, "none")  # as native bodies say it
LEAST_OUTPUT = 16  # OpenAI Responses takes no lower limit, and is sent this instead

# How many tokens a model reads. The first line with a pattern that matches counts.
CONTEXT_SIZES = """
200000: claude-*-4-5* o3*
1000000: claude-*
128000: gpt-4o*
1047576: gpt-4.1*
400000: gpt-5-pro* chat-latest
1050000: gpt-5.4 gpt-5.4-20* gpt-5.4-pro* gpt-5.5*
922000: gpt-5.6* gpt-6*
272000: gpt-5*
8191: text-embedding-*
"""


@functools.lru_cache(1000)
def look_up(table: str, model: str) -> frozenset[str]:
    """The words of the first line that has a pattern for the model."""
    for line in table.strip().splitlines():
        words, _, patterns = line.partition(": ")
        if matches(model, patterns.split()):
            return frozenset(words.split())
    return frozenset()


def context_size(model: str) -> int | None:
    return int(min(look_up(CONTEXT_SIZES, model), default="0")) or None


def capability(model: str) -> frozenset[str]:
    return look_up(CAPABILITIES, model)


def filled(**fields: Any) -> dict[str, Any]:
    """The fields that are not empty."""
    return {key: value for key, value in fields.items() if value not in (None, "", [], {})}


def image_url(image: Image) -> str:
    return image.source.get("url") or "data:{media_type};base64,{data}".format(**image.source)


# Both are in the usage chunk of a Chat stream, which may be there only for the proxy.
SOME_USAGE, NO_CHOICES = re.compile(rb'"usage":\s*\{'), re.compile(rb'"choices":\s*\[\s*\]')


def function_call(call: ToolUse) -> dict[str, Any]:
    """As OpenAI Chat has it, and the browser's contract too."""
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def spans(content: Any, kind: type[Text | Thinking]) -> Iterator[Event]:
    """Text of a kind; Mistral may mix thinking and text in one list."""
    for part in content if isinstance(content, list) else [content]:
        match part:
            case (str() as text) | {"text": str() as text} if text:
                yield kind(text)
            case {"thinking": thoughts}:
                yield from spans(thoughts, Thinking)


# What Anthropic's grammar knows of JSON Schema: what holds schemas by name, or one or more of them,
# other words, and some values of words that it knows no others of. The rest are bounds.
SCHEMA_MAPS = ("properties", "$defs", "definitions")
SCHEMA_PARTS = (*SCHEMA_MAPS, "items", "anyOf", "allOf")
SCHEMA_WORDS = {
    *SCHEMA_PARTS, "$ref", "type", "enum", "const", "default", "required", "additionalProperties",
    "title", "description",
}  # fmt: skip
SCHEMA_VALUES = {"minItems": "0 1", "format": "date-time time date duration email hostname uri "
                 "ipv4 ipv6 uuid"}  # fmt: skip
SCHEMA_BOUNDS = {
    "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minLength",
    "maxLength", "pattern", "format", "minItems", "maxItems", "uniqueItems",
}  # fmt: skip


def closed(schema: dict[str, Any], dropped: list[str]) -> dict[str, Any]:
    """A copy in which no object has more than its properties, as Anthropic wants it. Bounds, which
    its grammar does not know, become a part of the description, as in its own SDK; no shorter word
    does, or the body would be more tokens than was held for."""
    schema = decode_json(msgspec.json.encode(schema))
    schema.pop("$schema", None)
    todo: list[Any] = [schema]
    for node in todo:  # which grows: a recursion could be too deep
        if not isinstance(node, dict):
            continue
        if "oneOf" in node and "anyOf" not in node:
            node["anyOf"] = node.pop("oneOf")
        if "properties" in node or "object" in str(node.get("type")):
            node["additionalProperties"] = False
        said = {}
        for name in sorted(node.keys() - SCHEMA_WORDS):
            if name not in SCHEMA_BOUNDS:
                drop(["response_format"], dropped)
                del node[name]
            elif str(node[name]) not in SCHEMA_VALUES.get(name, "").split():
                drop([name], dropped)
                said[name] = node.pop(name)
        if said:
            text = str(node.get("description") or "")
            node["description"] = f"{text} {msgspec.json.encode(said).decode()}".strip()
        for name in SCHEMA_PARTS:
            inner = node.get(name)
            if isinstance(inner, dict):
                inner = [*inner.values()] if name in SCHEMA_MAPS else [inner]
            todo += inner if isinstance(inner, list) else []
    return schema


@functools.cache
def escaped(secret: bytes) -> re.Pattern[bytes]:
    """A pattern for ASCII text as JSON may escape it."""
    spelled = (b"(?:\\\\?%b|\\\\u00%02x)" % (re.escape(bytes((c,))), c) for c in secret)
    return re.compile(b"".join(spelled), re.IGNORECASE)


class Adapter:
    """One upstream call in one dialect. After encode(), `dropped` names the parameters the model
    would have rejected, `cut` holds the stop texts that we must apply ourselves, and `passing` says
    that the caller gets the vendor's bytes, `usage_hidden` without the usage chunk that only we
    asked for. While the answer comes, `begun` says whether it has begun, `usage` what it used so
    far, `unseen` how many of its bytes are in no event, and `complete` whether the terminal event
    has arrived."""

    path: ClassVar[str]
    limit: ClassVar[str]  # what the dialect calls max_tokens
    unsupported: ClassVar[tuple[str, ...]]  # parameters that the dialect does not have
    idle: ClassVar[tuple[str, ...]] = ("none",)  # efforts that mean no reasoning
    thinking = False  # does encode() ask for it?
    excludes_cached: ClassVar = False  # does input_tokens leave out cached ones?

    def __init__(self, provider: Provider, model: str) -> None:
        self.base_url, self.model = provider.base_url.rstrip("/"), model
        self.openai_ids, self.allow = (provider.organization, provider.project), provider.allow
        self.can, self.is_openai = capability(model), "api.openai.com" in self.base_url
        # some of them ignore all names of max_tokens but one
        self.compatible = provider.adapter == "chat" and not self.is_openai
        self.reasons = not self.can.isdisjoint(("always", "on", "off"))  # seen or not
        self.sse, self.usage, self.secret, self.unseen = SSE(), Usage(), b"", 0
        self.counts: dict[str, Any] = {}
        self.calls: dict[Any, ToolUse] = {}
        self.call_keys: dict[Any, Any] = {}  # of calls whose own index or id is not the key
        self.dropped: list[str] = []
        self.cut: list[str] = []
        self.reason = "stop"
        self.complete = self.begun = self.ending = self.passing = self.usage_hidden = False

    def url(self, path: str) -> str:
        return self.base_url + (path or self.path)

    def headers(self, key: str) -> dict[str, str]:
        return {"authorization": f"Bearer {key}"} if key else {}

    def encode(self, request: Request) -> dict[str, Any]:
        """The body to send. Raises BadRequest where the model cannot be asked."""
        if request.native is not None:
            self.passing = True
            native = request.native | {"model": self.model} | self.fit(request.native, request)
            if not request.path:
                given = [name for name in MAX_TOKENS if native.pop(name, None)]
                name = given[-1] if given and not self.compatible else self.limit
                native[name] = request.max_tokens
            return native
        names = [*self.unsupported, *self.rejects(request)]
        names = [name for name in names if getattr(request, name) is not None]
        thinking = "reasoning_effort" if request.effort else "enable_thinking"
        self.dropped += [thinking if name == "thinking" else name for name in names]
        request = replace(request, **dict.fromkeys(names))
        self.thinking = bool(request.thinking)
        sampling = {name: getattr(request, name) for name in Sampling.__struct_fields__}
        return filled(model=self.model, **sampling | self.body(request), stream=True)

    def fit(self, native: dict[str, Any], request: Request) -> dict[str, Any]:
        """The fields of a native body to replace or add."""
        return {}

    def always(self, request: Request) -> bool:
        """Is a model that always reasons asked not to?"""
        idle = request.effort in self.idle or (not request.effort and request.thinking is False)
        return idle and "always" in self.can

    def rejects(self, request: Request) -> Iterable[str]:
        """The parameters that this model rejects, given the others."""
        raise NotImplementedError

    def body(self, request: Request) -> dict[str, Any]:
        """The other fields that encode() sends; empty ones are left out."""
        raise NotImplementedError

    def decode(self, event: dict[str, Any]) -> Iterable[Event]:
        """The neutral events of one vendor event; unknown ones have none. (It runs for every token,
        and a pattern `str(text)` would double its time: so `str() as text`.)"""
        raise NotImplementedError

    def hide_key(self, data: bytes) -> bytes:
        """The vendor's bytes, with our key removed should they repeat it."""
        if len(self.secret) < 16:  # a word that may be said, like "ollama"
            return data
        data = data.replace(self.secret, b"[removed]")
        spelled = BACKSLASH in data and (b"\\u00" in data or b"\\/" in data)
        return escaped(self.secret).sub(b"[removed]", data) if spelled else data

    def feed(self, chunk: bytes) -> Batch:
        """Decode the events that `chunk` completes, up to the terminal one. For a caller that
        speaks the dialect their bytes come first, except those of a failure, unless an SDK reads
        more in it than an error (`relayed`)."""
        passed = b""
        batch: Batch = []
        for event in self.sse.feed(chunk):
            event = self.hide_key(event)
            if self.complete:
                break
            try:
                if data := event_data(event):
                    sent = {"type": "[DONE]"} if data == b"[DONE]" else read_json(data)
                    self.begun = self.begun or sent.get("type") != "ping"
                    batch += self.decode(sent)
            except NO_JSON:
                batch.append(self.fail("the vendor's stream holds something that is not JSON"))
            except (AttributeError, LookupError, TypeError):
                pass  # of a shape nobody expects: skipped
            if self.passing:
                failed = batch and isinstance(batch[-1], Failure) and not batch[-1].error.relayed
                hidden = self.usage_hidden and SOME_USAGE.search(event) and NO_CHOICES.search(event)
                passed += b"" if failed or hidden else event
        return [Raw(passed), *batch] if passed else batch

    def read(self, body: bytes) -> Batch:
        """The same for an answer in one piece."""
        self.complete = True
        try:
            reply = msgspec.convert(read_json(body), dict[str, Any])
        except NO_JSON:
            raise UpstreamError(502, "the vendor's answer is not a JSON object") from None
        failed = reply.get("status") == "failed"
        if error := reply.get("error"):
            failure = self.fail(error).error
            if "id" not in reply or (failed and not self.showable(error, failure)):
                raise failure
        self.count(reply)
        # embeddings have no output, and counted tokens have no usage at all
        embedded = "data" in reply and isinstance(reply.get("usage"), dict)
        self.usage.known = self.usage.known or embedded or "input_tokens" in reply
        reason = "stop"
        match reply:
            case {"choices": [{"message": {"refusal": str(text)}}, *_]} if text:
                reason = "content_filter"
            case (
                {"stop_reason": str(end)}
                | {"choices": [{"finish_reason": str(end)}, *_]}
                | {"incomplete_details": {"reason": str(end)}}
            ):
                reason = REASONS.get(end, reason)
                failed = failed or end in BROKEN
        return [Raw(self.hide_key(body)), Finish("failed" if failed else reason)]

    def count(self, reply: dict[str, Any]) -> None:
        """Later figures replace the earlier ones, but may lack some of them."""
        if not isinstance(figures := reply.get("usage"), dict):
            return
        self.counts |= {key: value for key, value in figures.items() if value is not None}
        details = [value for value in self.counts.values() if isinstance(value, dict)]
        self.usage = usage = Usage()
        if isinstance(output := reply.get("output"), list):  # OpenAI lists its searches
            kinds = [item.get("type") for item in output if isinstance(item, dict)]
            usage.web_searches = kinds.count("web_search_call")
        nested = ((k, n) for found in details for k, n in found.items() if k not in self.counts)
        for key, tokens in itertools.chain(self.counts.items(), nested):
            name = FIGURES.get(key)
            if name and isinstance(tokens, int) and 0 <= tokens <= 10**9:  # else it is nonsense
                setattr(usage, name, max(getattr(usage, name), tokens))
                usage.known = usage.known or name == "output_tokens"
        total = self.counts.get("total_tokens")  # with thinking, where that is counted apart
        if usage.known and isinstance(total, int) and total <= 10**9:
            usage.output_tokens = max(usage.output_tokens, total - usage.input_tokens)
        if self.excludes_cached:
            usage.input_tokens += usage.cache_read_tokens + usage.cache_write_tokens

    def ended(self) -> bool:
        """Is all there but the terminal event, which not every compatible vendor sends?"""
        whole = self.usage.known and not self.sse.buffer.strip()
        return self.compatible and self.ending and whole

    def finish(self) -> Iterator[Event]:
        """The complete calls, then the Finish. Arguments that are not JSON were cut off: that call
        is not reported, and the answer counts as truncated."""
        self.complete = True
        reason = "tool_calls" if self.calls and self.reason == "stop" else self.reason
        for call in self.calls.values():
            arguments = call.arguments.strip()
            if arguments in ("", "null") and reason not in ("length", "content_filter"):
                arguments = "{}"
            try:
                given = msgspec.convert(read_json(arguments.encode()), dict[str, Any])
                if "NaN" in arguments or "Infinity" in arguments:  # no JSON for a browser
                    arguments = msgspec.json.encode(given).decode()
                # older servers send none
                yield ToolUse(call.id or f"call_{secrets.token_hex(8)}", call.name, arguments)
            except NO_JSON:
                reason = "length" if reason != "content_filter" else reason
        yield Finish(reason)

    def fail(self, error: Any) -> Failure:
        """A vendor's error object, as the error the caller is shown."""
        self.complete = True
        error = error if isinstance(error, dict) else {"message": str(error or "")}
        given = [error.get(key) for key in ("status_code", "code", "type")]
        statuses = (n if n in range(400, 600) else UPSTREAM_TYPES.get(str(n)) for n in given)
        message = str(error.get("message") or "the vendor reported an error")
        return Failure(UpstreamError(next(filter(None, statuses), 502), message, error))

    def showable(self, error: Any, failure: UpstreamError) -> bool:
        """May the caller see it unchanged: is it not about our account, and without a key?"""
        text = str(error)
        plain = redact(text, [self.secret.decode()], len(text)) == text
        return plain and failure.code != "upstream_auth"


class Messages(Adapter):
    """Anthropic Messages. Source: docs.anthropic.com/en/api/messages, version 2023-06-01."""

    path, unsupported, excludes_cached, limit = "/messages", ("seed",), True, "max_tokens"
    idle = ("none", "minimal")

    def url(self, path: str) -> str:
        return f"{self.base_url.removesuffix('/v1')}/v1{path or self.path}"

    def headers(self, key: str) -> dict[str, str]:
        return {"anthropic-version": "2023-06-01"} | ({"x-api-key": key} if key else {})

    def fit(self, native: dict[str, Any], request: Request) -> dict[str, Any]:
        most = request.max_tokens
        match native:
            # only where we lowered max_tokens: else it is the caller's mistake, or a beta
            case {"thinking": {"budget_tokens": int(budget)} as thinking} if (
                budget >= most and most != (asked := native.get("max_tokens")) and not request.path
            ):
                self.dropped.append("thinking")
                share = max(1024, min(most - 1, budget * most // (asked or budget)))
                lowered = thinking | {"budget_tokens": share}
                return {"thinking": lowered if most > 1024 else {"type": "disabled"}}
        return {}

    def rejects(self, request: Request) -> Iterator[str]:
        self.dropped += ["strict"] if any(tool.strict for tool in request.tools) else []
        self.dropped += request.openai
        forced = request.tool_choice not in (None, "auto", "none")
        if unforced := forced and "unforced" in self.can:
            yield "tool_choice"
        # forced tools and thinking exclude each other, as do thinking and sampling
        thinks = request.thinking and forced == unforced and self.thinks(request)
        if (request.thinking and not thinks) or self.always(request):
            yield "thinking"
        if thinks or "unsampled" in self.can:
            yield from ("temperature", "top_p", "top_k")
        elif (request.temperature or 0) > 1:  # which is the default, too; OpenAI's scale ends at 2
            yield "temperature"
        elif "one" in self.can and request.temperature is not None:
            yield "top_p"

    def thinks(self, request: Request) -> bool:
        """A budget is at least 1,024 and below max_tokens. In the middle of a tool call the vendor
        wants its own thinking back, which a browser does not keep."""
        after = itertools.takewhile(lambda m: m.role != "assistant", reversed(request.messages))
        parts = [part for message in after for part in message.content]
        begun = not parts or any(isinstance(part, ToolResult) for part in parts)
        budget = "budget" in self.can and request.max_tokens > 1024 and not begun
        return budget or "adaptive" in self.can

    def body(self, request: Request) -> dict[str, Any]:
        self.cut = [stop for stop in request.stop if not stop.strip()]
        share = {"low": 4, "high": 1.5, "xhigh": 1.5, "max": 1.5}.get(request.effort, 2)
        tokens = max(1024, int(request.max_tokens / share))
        budget = {"type": "enabled", "budget_tokens": tokens}
        adaptive = {"type": "adaptive", "display": "summarized"}
        thinking = adaptive if "adaptive" in self.can else budget
        off = {"type": "disabled"} if request.thinking is False and "on" in self.can else None
        # a history of calls is refused without tools; these are not to be called again
        tools = request.tools or [Tool(name, "", {"type": "object"}) for name in request.called()]
        choice = request.tool_choice if request.tools or not tools else "none"
        named = {"type": "tool", "name": choice["name"]} if isinstance(choice, dict) else None
        how = named or filled(type="any" if choice == "required" else choice)
        if request.parallel is False and request.tools and choice != "none":
            how = {"type": "auto"} | how | {"disable_parallel_tool_use": True}
        form, system, shape = request.output_format, request.system, None
        if form and "json_schema" in form:
            schema = closed(form["json_schema"]["schema"], self.dropped)
            shape = {"type": "json_schema", "schema": schema}
        elif form:  # which can only be said in words
            self.dropped.append("response_format")
            system = lock_prompt(system, "Answer with one JSON object and nothing else.")
        effort = request.effort if request.thinking and "adaptive" in self.can else None
        if effort == "xhigh" and "unsampled" not in self.can:  # 4.6 does not know it
            self.dropped.append("reasoning_effort")
            effort = "high"
        return {
            "max_tokens": request.max_tokens,
            "system": system,
            "messages": self.turns(request),
            "tools": [
                {"name": t.name, "description": t.description, "input_schema": t.parameters}
                for t in tools
            ],
            "tool_choice": how,
            "output_config": filled(effort=effort, format=shape),
            "thinking": thinking if request.thinking else off,
            "stop_sequences": [stop for stop in request.stop if stop.strip()],
        }

    def turns(self, request: Request) -> list[dict[str, Any]]:
        """System text stands between a user's turn and an answer, or else in a user's turn."""
        hello = [Message("user", [Text("(hello)")])]  # the vendor wants a user's turn first
        turns = hello if request.messages[0].role == "assistant" else []
        roles = [message.role for message in request.messages]
        for i, message in enumerate(request.messages):
            between = roles[i - 1 : i] == ["user"] and roles[i + 1 : i + 2] != ["user"]
            folded = message.role == "system" and not ("mid" in self.can and between)
            turns.append(Message("user" if folded else message.role, message.content))
        _, turns = join_messages(turns)
        if turns[-1].role == "assistant" and "unfilled" in self.can:
            raise BadRequest(f"messages: {self.model} needs the last message to be the user's")
        match turns[-1]:
            case Message("assistant", [*_, Text(text)]):  # which must not end in white space
                turns[-1].content[-1] = Text(text.rstrip())
        return [{"role": t.role, "content": [*map(self.block, t.content)]} for t in turns]

    def block(self, part: Part) -> Any:
        """Text, images and results are written as this dialect has them."""
        match part:
            case ToolUse(call, name, arguments):
                given = msgspec.Raw(arguments.encode())
                return {"type": "tool_use", "id": call, "name": name, "input": given}
            case File({"filename": title, "file_data": url}):
                source = {"type": "base64", "media_type": "application/pdf"}
                data = url.partition(",")[2]
                return {"type": "document", "title": title, "source": source | {"data": data}}
        return part

    def decode(self, event: dict[str, Any]) -> Iterator[Event]:
        index = event.get("index")
        match event.get("type"), event.get("content_block", event.get("delta")):
            case "content_block_delta" | "content_block_start", {"text": str() as text} if text:
                yield Text(text)
            case "content_block_delta", {"thinking": str() as text} if text:
                yield Thinking(text)
            case "content_block_delta", {"partial_json": str() as text} if index in self.calls:
                self.calls[index].arguments += text
            case "content_block_delta", {"partial_json": str() as text}:  # a vendor's own tool's
                self.unseen += len(text.encode())
            case "content_block_start", {"type": "tool_use", "id": call, "name": name, **block}:
                given = msgspec.json.encode(block["input"]).decode() if block.get("input") else ""
                self.calls[index] = ToolUse(str(call), str(name), given)
            case "message_start", _:
                self.count(event["message"])
                self.usage.known = False
            case "message_delta", dict() as delta:
                self.reason = REASONS.get(delta.get("stop_reason"), self.reason)
                self.count(event)
            case "message_stop", _:
                yield from self.finish()
            case "error", _:
                yield self.fail(event.get("error"))


class OpenAI(Adapter):
    """What OpenAI's two dialects have in common."""

    def headers(self, key: str) -> dict[str, str]:
        names = ("openai-organization", "openai-project")
        return super().headers(key) | filled(**dict(zip(names, self.openai_ids, strict=True)))

    def thinks(self) -> bool:
        """Models of others than OpenAI may."""
        return self.reasons or not (self.is_openai or "plain" in self.can)

    def effort(self, request: Request) -> str | None:
        """The reasoning effort for enable_thinking; None leaves it to the model."""
        if request.effort and self.thinks():
            return None if self.always(request) else request.effort
        if request.thinking:
            return None if self.reasons and "-pro" in self.model else "medium"
        return "none" if request.thinking is False and "on" in self.can else None

    def rejects(self, request: Request) -> Iterator[str]:
        effort = self.effort(request)
        idle = effort == "none" or (effort is None and "off" in self.can)
        if self.reasons and not idle:  # nothing is sampled while a model reasons
            yield from ("temperature", "top_p")
        if (request.thinking and not self.thinks()) or self.always(request):
            yield "thinking"
        parts = itertools.chain(*(message.content for message in request.messages))
        if any(isinstance(part, ToolResult) and part.is_error for part in parts):
            self.dropped.append("is_error")


class Responses(OpenAI):
    """OpenAI Responses. Source: platform.openai.com/docs/api-reference/responses-streaming."""

    path, unsupported, limit = "/responses", ("seed", "top_k"), "max_output_tokens"

    def fit(self, native: dict[str, Any], request: Request) -> dict[str, Any]:
        if "store" in self.allow:
            return {}
        asked, thoughts = native.get("include") or [], "reasoning.encrypted_content"
        plain = request.path or not self.reasons or "store" in native or not isinstance(asked, list)
        if plain or thoughts in asked:
            return {"store": False}
        # an SDK that thinks it is stored would refer to reasoning that is not there
        return {"store": False, "include": [*asked, thoughts]}

    def body(self, request: Request) -> dict[str, Any]:
        self.cut = request.stop
        tokens = max(LEAST_OUTPUT, request.max_tokens)
        if tokens > request.max_tokens:
            self.dropped.append("max_tokens")
        # an effort is asked for over Chat, and OpenAI gives not every account a summary
        summary = "auto" if request.thinking and not request.effort else None
        form = request.output_format  # whose schema stands one level higher here
        system, messages = request.system, request.messages
        if system and form and "json_schema" not in form:
            # the word JSON must be in the input, and not only in the instructions
            system, messages = "", [Message("system", [Text(system)]), *messages]
        shape = form and {"type": form["type"]} | form.get("json_schema", {})
        verbosity = request.openai.get("verbosity")
        return request.openai | {
            "max_output_tokens": tokens,
            "store": False,
            "verbosity": None,
            "text": filled(format=shape, verbosity=verbosity),
            "parallel_tool_calls": request.parallel if request.tools else None,
            "instructions": system,
            "input": [item for message in messages for item in self.items(message)],
            "tools": [{"type": "function"} | asdict(t) for t in request.tools],
            "tool_choice": request.tool_choice,
            "reasoning": filled(effort=self.effort(request), summary=summary),
        }

    def items(self, message: Message) -> Iterator[dict[str, Any]]:
        role = "developer" if message.role == "system" else message.role
        content: list[dict[str, Any]] = []
        for part in message.content:
            match part:
                case Text(text) if role == "assistant":
                    yield {"role": role, "content": text}
                case Text(text):
                    content.append({"type": "input_text", "text": text})
                case Image():
                    content.append({"type": "input_image", "image_url": image_url(part)})
                case File(file):
                    content.append({"type": "input_file"} | file)
                case ToolUse(call, name, arguments):
                    item = {"type": "function_call", "call_id": call, "name": name}
                    yield item | {"arguments": arguments}
                case ToolResult(call, output):
                    yield {"type": "function_call_output", "call_id": call, "output": output}
        if content:
            yield {"role": role, "content": content}

    def decode(self, event: dict[str, Any]) -> Iterator[Event]:
        kind = str(event.get("type")).removeprefix("response.")
        match kind, event.get("delta", event.get("item")):
            case "output_text.delta", str() as text if text:
                yield Text(text)
            case "refusal.delta", str() as text if text:
                self.reason = "content_filter"
                yield Text(text)
            case "reasoning_summary_text.delta" | "reasoning_text.delta", str() as text if text:
                yield Thinking(text)
            case "function_call_arguments.delta", str() as text:
                self.calls[self.call_keys[event["item_id"]]].arguments += text
            case "custom_tool_call_input.delta", str() as text:
                self.unseen += len(text.encode())
            case "function_call_arguments.done", _:
                self.calls[self.call_keys[event["item_id"]]].arguments = str(event["arguments"])
            case _, {"type": "function_call", "call_id": call, "name": name, **item}:
                arguments = str(item.get("arguments") or "")  # all of them when it is done
                self.call_keys[item.get("id")] = str(call)  # vLLM's are not always given an id
                self.calls[str(call)] = ToolUse(str(call), str(name), arguments)
            case "completed" | "incomplete", _:
                response = event["response"]
                details = response.get("incomplete_details") or {}
                default = "length" if kind == "incomplete" else self.reason
                self.reason = REASONS.get(details.get("reason"), default)
                self.count(response)
                yield from self.finish()
            case "failed" | "error", _:
                reply = event.get("response", event)
                self.count(reply)  # nested, as recorded, or flat, as the SDK has it
                failure = self.fail(error := reply.get("error") or event | {"type": None})
                passed = self.passing and kind == "failed"  # an SDK wants the response
                failure.error.relayed = passed and self.showable(error, failure.error)
                yield failure


class Chat(OpenAI):
    """OpenAI Chat Completions, as OpenAI and the compatible vendors speak it.
    Source: platform.openai.com/docs/api-reference/chat-streaming."""

    path, unsupported = "/chat/completions", ("top_k",)
    counted_last = False  # did the last chunk with a choice have a count?

    @property
    def counted(self) -> dict[str, Any]:
        """Mistral counts unasked, and refuses to be asked."""
        return {} if "mistral.ai" in self.base_url else {"include_usage": True}

    @property
    def limit(self) -> str:  # type: ignore[override]
        return "max_completion_tokens" if self.is_openai or self.reasons else "max_tokens"

    def fit(self, native: dict[str, Any], request: Request) -> dict[str, Any]:
        options = dict(native.get("stream_options") or {})
        self.usage_hidden = options.get("include_usage") is not True
        options |= self.counted if request.stream else {}
        counted = {"stream_options": options} if options else {}
        kept = "store" in self.allow or not self.is_openai or request.path
        return counted | ({} if kept else {"store": False})

    def body(self, request: Request) -> dict[str, Any]:
        if request.tools and "elsewhere" in self.can:
            raise BadRequest(f"tools: {self.model} takes them only over the responses adapter")
        self.cut = request.stop if self.reasons or len(request.stop) > 4 else []
        choice: Any = request.tool_choice
        if isinstance(choice, dict):
            choice = {"type": "function", "function": {"name": choice["name"]}}
        messages = [Message("system", [Text(request.system)]), *request.messages]
        return request.openai | {
            self.limit: request.max_tokens,
            "response_format": request.output_format,
            "parallel_tool_calls": request.parallel if request.tools else None,
            "messages": [turn for message in messages for turn in self.turns(message)],
            "tools": [{"type": "function", "function": t} for t in request.tools],
            "tool_choice": choice,
            "reasoning_effort": self.effort(request),
            "stop": [] if self.cut else request.stop,
            "stream_options": self.counted,
        }

    def turns(self, message: Message) -> Iterator[dict[str, Any]]:
        blocks: list[Any] = []
        calls = []
        for part in message.content:
            match part:
                case Text() | File():
                    blocks.append(part)
                case Image():
                    blocks.append({"type": "image_url", "image_url": {"url": image_url(part)}})
                case ToolUse():
                    calls.append(function_call(part))
                case ToolResult(call, output):
                    yield {"role": "tool", "tool_call_id": call, "content": output}
        texts = [part.text for part in blocks if isinstance(part, Text)]
        # a string wherever that is enough: not every compatible server reads a list
        content = "\n\n".join(texts) if len(texts) == len(blocks) else blocks
        if content or calls:
            yield {"role": message.role, "content": content or None} | filled(tool_calls=calls)

    def decode(self, event: dict[str, Any]) -> Iterator[Event]:
        self.count(event)
        match event:
            case {"error": error} if error:
                yield self.fail(error)
            case {"choices": [dict() as choice, *others]}:
                # a content filter may leave out the delta
                delta, end = choice.get("delta") or {}, choice.get("finish_reason")
                if choice.get("error") or end in BROKEN:
                    yield self.fail(choice.get("error"))
                    return
                self.ending = self.ending or bool(end)
                self.counted_last = isinstance(event.get("usage"), dict)
                if not self.ending:  # a running count, not the final one
                    self.usage.known = False
                yield from spans(delta.get("reasoning_content") or delta.get("reasoning"), Thinking)
                yield from spans(delta.get("content") or delta.get("refusal"), Text)
                self.reason = REASONS.get("refusal" if delta.get("refusal") else end, self.reason)
                if others or "function_call" in delta:
                    self.unseen += len(msgspec.json.encode([others, delta.get("function_call")]))
                for call in delta.get("tool_calls") or ():
                    self.add_call(call, choice.get("index") or 0)
            case {"type": "[DONE]"}:
                self.usage.known |= self.counted_last and self.usage.output_tokens > 0
                yield from self.finish()

    def add_call(self, delta: Any, choice: Any) -> None:
        """The id and the name come only with the first piece of a call."""
        if "custom" in delta:
            self.unseen += len(msgspec.json.encode(delta))
        function, id, own = delta.get("function") or {}, delta.get("id"), delta.get("index")
        # some vendors send no index, and some send 0 for all
        place = self.call_keys.get((choice, own), (choice, id if own is None else own))
        last = next(reversed(self.calls), place)
        key = last if own is None and id is None else place
        other = key in self.calls and self.calls[key].id not in ("", id)
        if other and id and function.get("name"):
            key = self.call_keys[choice, own] = (choice, id)
        call = self.calls.setdefault(key, ToolUse("", "", ""))
        call.id = call.id or str(id or "")
        call.name = call.name or str(function.get("name") or "")
        given = function.get("arguments") or ""
        call.arguments += given if isinstance(given, str) else msgspec.json.encode(given).decode()


ADAPTERS: dict[str, type[Adapter]] = {"messages": Messages, "responses": Responses, "chat": Chat}


class StopCutter:
    """Ends an answer at a stop text where the vendor cannot. Text that may be the beginning of one
    is held back until what follows decides it."""

    def __init__(self, stops: list[str]) -> None:
        self.stops, self.held = stops, ""

    def cut(self, batch: Batch) -> Batch:
        result: Batch = []
        for event in batch:
            if isinstance(event, Text):
                text = self.held + event.text
                found = [(at + len(s), at) for s in self.stops if (at := text.find(s)) >= 0]
                starts = (stop[:n] for stop in self.stops for n in range(len(stop)))
                keep = max((len(start) for start in starts if text.endswith(start)), default=0)
                end = min(found)[1] if found else len(text) - keep  # of the first that is whole
                result += [Text(text[:end])] if end else []
                if found:
                    return [*result, Finish("stop")]
                self.held = text[end:]
            else:
                result += [Text(self.held), event] if self.held else [event]
                self.held = ""
        return result


# ---- Writers -----------------------------------------------------------------------------------
# Events to the bytes of a reply: the browser's contract, not the network. `filler` is what may be
# sent while the vendor is silent; `early` says whether the headers go out with the vendor's first
# event or wait for the whole answer.


DONE = b"data: [DONE]\n\n"


def frame(data: dict[str, Any]) -> bytes:
    return b"data: %b\n\n" % msgspec.json.encode(data)


class Writer:
    """An answer as JSON, in the one shape that loses no tool call, whichever branch of the SDK
    reads it: `choices` and the flat keys side by side, and no `output`. White space before JSON is
    valid JSON."""

    media_type, filler, early = "application/json", b" ", False

    def __init__(self, thinking: bool) -> None:
        self.show_thinking, self.thinking, self.count = thinking, False, 0
        self.texts: list[str] = []
        self.calls: list[dict[str, Any]] = []

    def tokens(self, batch: Batch) -> Iterator[str]:
        """The texts to show, thinking between <think> and </think> where it was asked for."""
        for event in batch:
            thinks = type(event) is Thinking
            if self.show_thinking and thinks != self.thinking:
                yield "<think>" if thinks else "</think>"
                self.thinking = thinks
            if type(event) is ToolUse:
                self.calls.append(function_call(event))
            elif type(event) is Text or (type(event) is Thinking and self.show_thinking):
                yield event.text

    def write(self, batch: Batch, ttfb: float) -> bytes:
        """The bytes of one network read; none when there is nothing to say yet."""
        self.texts += self.tokens(batch)
        return b""

    def end(self, finish: str, report: dict[str, Any]) -> bytes:
        content = "".join(self.texts) or ("" if self.calls else " ")  # the SDK rejects an empty one
        body = {"content": content} | filled(tool_calls=self.calls)
        choice = {"index": 0, "message": {"role": "assistant"} | body, "finish_reason": finish}
        return msgspec.json.encode(body | {"finish_reason": finish, "choices": [choice]} | report)

    def error(self, error: ProxyError, request_id: str) -> bytes | None:
        """The end of a failed reply already begun; None where only a cut-off can show it."""
        return None


class FrameWriter(Writer):
    """The SDK's stream: one `data:` line a token, the last one with `isLast`, then [DONE]."""

    media_type, filler, early = "text/event-stream; charset=utf-8", b": ping\n\n", True

    def write(self, batch: Batch, ttfb: float) -> bytes:
        data = b""
        for text in self.tokens(batch):
            token: dict[str, Any] = {"token": text, "tokenId": self.count}
            if not self.count:
                token |= {"isFirst": True, "ttfbMs": int(ttfb * 1000)}
            data += frame(token)
            self.count += 1
        return data

    def end(self, finish: str, report: dict[str, Any]) -> bytes:
        last = {"token": "", "tokenId": self.count, "isLast": True, "finishReason": finish}
        return frame(last | filled(toolCalls=self.calls) | report) + DONE

    def error(self, error: ProxyError, request_id: str) -> bytes:
        line = {"message": error.message, "statusCode": error.status, "code": error.code}
        return b"error: %b\n\n" % msgspec.json.encode(line)


PINGS = {"messages": b'event: ping\ndata: {"type": "ping"}\n\n'}


class NativeWriter(Writer):
    """The vendor's own bytes, for a caller that speaks its dialect."""

    def __init__(self, dialect: str, stream: bool) -> None:
        super().__init__(False)
        self.dialect, self.early, self.held, self.last = dialect, stream, b"", b""
        if stream:
            self.media_type, self.filler = FrameWriter.media_type, PINGS.get(dialect, b": ping\n\n")

    def write(self, batch: Batch, ttfb: float) -> bytes:
        match batch:
            case [Raw(data), *_, Finish()]:
                self.held = data  # sent by end(), after its row
            case [Raw(data), *_]:
                self.last = data if b"sequence_number" in data else self.last
                return data
        return b""

    def end(self, finish: str, report: dict[str, Any]) -> bytes:
        return self.held

    def error(self, error: ProxyError, request_id: str) -> bytes | None:
        if not self.early:
            return None
        if isinstance(error, UpstreamError) and error.relayed:
            return b""
        event = b"event: error\n" if self.dialect != "chat" else b""
        body = error_body(error, request_id, self.dialect)
        if self.dialect == "responses":  # whose events are numbered
            known = re.findall(rb'"sequence_number":\s*(\d{1,9})\b', self.last)
            number = int(known[-1]) + 1 if known else 0
            body = b'{"type":"error","sequence_number":%d,%b' % (number, body[1:])
        return b"%bdata: %b\n\n" % (event, body)


class ChatWriter(NativeWriter):
    """OpenAI Chat Completions, for a model that lives at a vendor of another dialect."""

    def __init__(self, model: str, stream: bool, show_usage: bool) -> None:
        super().__init__("chat", stream)
        self.show_usage = show_usage
        kind = "chat.completion.chunk" if stream else "chat.completion"
        self.base: dict[str, Any] = {"id": f"chatcmpl-{secrets.token_hex(12)}", "object": kind}
        self.base |= {"created": int(time.time()), "model": model}
        self.role, self.deltas = {"role": "assistant"}, list[dict[str, Any]]()

    def chunk(self, delta: dict[str, Any], finish: str | None = None) -> bytes:
        choice = {"index": 0, "delta": self.role | delta, "finish_reason": finish}
        self.role = {}  # which only the first one has
        return frame(self.base | {"choices": [choice]})

    def write(self, batch: Batch, ttfb: float) -> bytes:
        deltas: list[dict[str, Any]] = []
        for event in batch:
            if isinstance(event, Text | Thinking):
                name = "content" if isinstance(event, Text) else "reasoning_content"
                deltas.append({name: event.text})
            elif isinstance(event, ToolUse):
                call = function_call(event)
                deltas.append({"tool_calls": [{"index": len(self.calls)} | call]})
                self.calls.append(call)
        if self.early:
            return b"".join(map(self.chunk, deltas))
        self.deltas += deltas
        return b""

    def end(self, finish: str, report: dict[str, Any]) -> bytes:
        given = report["usage"]
        usage: dict[str, Any] = {name: n for name, n in given.items() if "_" in name}
        usage |= {"prompt_tokens_details": {"cached_tokens": given["cacheReadTokens"]}}
        usage |= {"completion_tokens_details": {"reasoning_tokens": given["reasoningTokens"]}}
        if self.early:
            counted = frame(self.base | {"choices": [], "usage": usage}) if self.show_usage else b""
            return self.chunk({}, finish) + counted + DONE
        names = ("content", "reasoning_content")
        text, thoughts = ("".join(delta.get(n, "") for delta in self.deltas) for n in names)
        message = self.role | {"content": text or None}
        message |= filled(tool_calls=self.calls, reasoning_content=thoughts)
        choice = {"index": 0, "message": message, "finish_reason": finish, "logprobs": None}
        return msgspec.json.encode(self.base | {"choices": [choice], "usage": usage})


# ---- Prices ------------------------------------------------------------------------------------
# USD per million tokens. What is not known costs None, never nothing.

# Models: input, output, cache read, cache write 5m and 1h. After "above N": how many times as much
# input (and cache) and output cost for the whole request when its input is larger than N tokens;
# "long" is OpenAI's 272000 2 1.5. A date behind a name (-20250929, -2025-08-07) is the same model
# at the same price.
BUILT_IN_PRICES = """
claude-fable-5 claude-mythos-5: 10 50 1 12.5 20
claude-fable-5-1 claude-mythos-5-1: 10 50 .25 12.5 20
claude-haiku-4-5: 1 5 .1 1.25 2; claude-haiku-5-5: .1 .5 .01 .125 .2 above 100000 5 5
claude-opus-4-5 claude-opus-4-6 claude-opus-4-7 claude-opus-4-8 claude-opus-5: 5 25 .5 6.25 10
claude-opus-5-5: 4 20 .2 5 8; claude-sonnet-4-5 claude-sonnet-4-6: 3 15 .3 3.75 6
claude-sonnet-5: 2 10 .2 2.5 4; claude-sonnet-5-5: 2 10 .1 2.5 4
gpt-4o: 2.5 10 1.25; gpt-4o-2024-05-13: 5 15; gpt-4o-mini: .15 .6 .075; gpt-4.1 o3: 2 8 .5
gpt-4.1-mini: .4 1.6 .1; gpt-5 gpt-5.1: 1.25 10 .125; gpt-5-mini: .25 2 .025
gpt-5-nano: .05 .4 .005; gpt-5-pro: 15 120; gpt-5.2 gpt-5.3-codex: 1.75 14 .175; gpt-5.2-pro: 21 168
gpt-5.4: 2.5 15 .25 long; gpt-5.4-mini: .75 4.5 .075; gpt-5.4-nano: .2 1.25 .02
gpt-5.4-pro gpt-5.5-pro: 30 180 long; gpt-5.5: 5 30 .5 long; gpt-5.6 gpt-5.6-sol: 4 20 .4 5 long
gpt-5.6-luna: .2 1.2 .02 .25 long; gpt-5.6-terra: 2 12 .2 2.5 long; gpt-6-astra: 10 50 1 12.5 long
gpt-6-luna: .1 .5 .01 .125 long; gpt-6-sol: 2 10 .2 2.5 long; gpt-6.1-sol: 2 10 .1 2.5 long
gpt-6.1-terra: 1 5 .05 1.25 long; chat-latest: 5 30 .5; o3-pro: 20 80
text-embedding-3-small: .02 0; text-embedding-3-large: .13 0; text-embedding-ada-002: .1 0
"""
DATED = re.compile(r"-20\d\d-?\d\d-?\d\d$")


@functools.cache
def built_in_prices() -> dict[str, Price]:
    prices: dict[str, Price] = {}
    table = BUILT_IN_PRICES.strip().replace("long", "above 272000 2 1.5").replace("\n", "; ")
    for entry in table.split("; "):
        models, _, rest = entry.partition(": ")
        figures, _, above = rest.partition(" above ")
        usd: Any = dict(zip(Price.__struct_fields__, map(Rate, figures.split()), strict=False))
        price = Price(**usd)
        if above:
            tokens, inputs, outputs = map(Decimal, above.split())
            times = dict.fromkeys(usd, inputs) | {"output": outputs}
            more: Any = {name: Rate(rate * times[name]) for name, rate in usd.items()}
            price = replace(price, above=Above(**more, tokens=int(tokens)))
        prices |= dict.fromkeys(models.split(), price)
    return prices


class Prices:
    """A pattern may begin with a provider, as in ollama/*: others may sell a model of that name.
    What is free there is free nowhere else."""

    def __init__(self, configured: Map[str, Price], providers: Iterable[str] = ()) -> None:
        self.configured = sorted(configured.items(), key=lambda item: -len(item[0]))
        self.providers = {*providers}

    def of(self, provider: str, name: str, tool: bool = False) -> Price | None:
        """The price of a model, or of a tool that runs at the vendor."""
        for pattern, price in self.configured:  # the longest, that is the most exact, first
            there = price.free and names_provider(pattern, self.providers)
            named = not there and matches(name, [pattern])
            known = named or matches(f"{provider}/{name}", [pattern])
            if known and tool == (price.per_use is not None):
                return price
        built_in = {} if tool else built_in_prices()
        return built_in.get(name) or built_in.get(DATED.sub("", name))

    def fee(self, provider: str, request: Request, searches: int | None = None) -> Decimal:
        """USD for the tools of a request that run at the vendor: for as many `searches` as the
        vendor has counted, and else for all uses that were allowed."""
        total = Decimal(0)
        for tool, uses in request.hosted:
            price = self.of(provider, tool, tool=True)
            counted = tool.startswith("web_search") and searches is not None
            each = price.per_use if price else None
            total += (each or 0) * ((searches or 0) if counted else uses)
        return total


def cost(usage: Usage, price: Price | None) -> Decimal | None:
    """USD of one answer; None where the price is not known."""
    if price is None or price.free:
        return Decimal(0) if price else None
    usd = price.above if price.above and usage.input_tokens > price.above.tokens else price
    read = usd.input if usd.cache_read is None else usd.cache_read
    write = usd.input if usd.cache_write_5m is None else usd.cache_write_5m
    write_1h = write if usd.cache_write_1h is None else usd.cache_write_1h
    cached = usage.cache_read_tokens + usage.cache_write_tokens
    total = max(0, usage.input_tokens - cached) * usd.input + usage.output_tokens * usd.output
    total += usage.cache_read_tokens * read + usage.cache_write_1h_tokens * write_1h
    total += (usage.cache_write_tokens - usage.cache_write_1h_tokens) * write
    return total / 1_000_000


Bound = tuple[Decimal, Decimal]  # USD: of all input, and of each token of output


def cost_bound(price: Price, inputs: int) -> Bound:
    """The most USD that so many tokens of input can cost, and that one token of output can."""
    if price.free:
        return Decimal(0), Decimal(0)
    tiers = (price, price.above) if price.above else (price,)
    kinds = ("input", "cache_read", "cache_write_5m", "cache_write_1h")
    dearest = max(getattr(tier, kind) or Decimal(0) for tier in tiers for kind in kinds)
    return inputs * dearest / 1_000_000, max(tier.output for tier in tiers) / 1_000_000


IMAGE_TOKENS = 7000  # no vendor counts more for one image, save one:
MINI_IMAGE_TOKENS = 50_000  # gpt-4o-mini: 2,833 and 5,667 for each of up to 8 tiles
ORIGINAL_IMAGE_TOKENS = 20_000  # as much more: up to 10,000 patches, some of which count as 2.46
TOOL_TOKENS = 1000  # what a vendor writes before the tools


def input_bound(request: Request, model: str = "") -> int:
    """The most tokens a request can be billed for as input: a token is at least a byte."""
    image = MINI_IMAGE_TOKENS if "gpt-4o-mini" in model else IMAGE_TOKENS
    asked, native = request.measure(), request.native or {}
    size = asked.size + image * asked.images + ORIGINAL_IMAGE_TOKENS * asked.large
    size += TOOL_TOKENS if request.tools or request.called() or native.get("tools") else 0
    # documents and search results may have far more tokens than the body has bytes, or far fewer;
    # but no model reads more than its context, once per turn
    if not (asked.documents or request.hosted):
        return size
    turns = 1 + sum(uses for _, uses in request.hosted)
    return (context_size(model) or max(size, 2_000_000)) * turns


def output_bound(tokens: int, n: int) -> int:
    """The most tokens that `n` answers of at most `tokens` can be billed for."""
    return max(LEAST_OUTPUT, tokens) * n if tokens else 0


# ---- Catalog -----------------------------------------------------------------------------------
# What may be asked of whom: who serves a model, an alias or a template, and what it may cost.

Target = tuple[str, str]  # a provider and a model of it: where an attempt goes
MODEL_PRICE = "input and output in USD per million tokens, or free = true"


def unpriced(name: str, price: str = MODEL_PRICE) -> str:
    missing = f"{name} has no price, so no budget can hold for it"
    return f'{missing}; the server\'s owner can add [prices."{name}"] with {price}'


class Catalog:
    """What the `providers`, those that have a key, serve. Raises ConfigError for a template that
    none of them serves and, where there is a budget (`capped`), for a model without a price."""

    def __init__(self, config: Config, providers: Iterable[str], capped: bool) -> None:
        self.config = config
        self.providers = {name: config.providers[name] for name in providers}
        self.prices = Prices(config.prices, config.providers)
        self.templates = self.template_targets()
        if capped:
            self.check_prices()

    def resolve(self, name: str, provider: str = "") -> list[Target]:
        """The targets of a model name or alias, first choice first. Where no `provider` was asked,
        the most exact offer of the name counts. Raises 403."""
        if not name:
            raise BadRequest("model: is missing; /v1/models lists what may be asked for")
        if targets := self.resolve_alias(name):
            return targets
        if name in self.config.models:
            raise ProxyError(403, "model_not_allowed", f"model: no provider of {name} has a key")
        prefix, _, rest = name.partition("/")
        offers = {p: settings.models for p, settings in self.providers.items()}
        homes = [provider] if provider else [*offers]
        found = [
            (home == provider, len(pattern) + len(name) - len(model), (home, model))
            for home, model in [(prefix, rest), *((home, name) for home in homes)]
            for pattern in offers.get(home, ())
            if model and self.is_meant(pattern, model, name)
        ]
        if found:
            return [max(found, key=lambda offer: offer[:2])[2]]
        others = [(len(g), p) for p in offers for g in offers[p] if self.is_meant(g, name, name)]
        other = f"; send it to /api/{max(others)[1]}" if others else ""
        sold = ", ".join(offers.get(provider, ()))
        offer = f"{provider} offers {sold}, not" if provider else "nobody offers"
        raise ProxyError(403, "model_not_allowed", f"model: {offer} {redact(name)!r}{other}")

    def is_meant(self, pattern: str, model: str, name: str) -> bool:
        """Does the pattern offer `model`, requested as `name`? o* does not offer ollama/…, whose
        provider only happens to begin alike."""
        prefix, slash, _ = name.partition("/")
        alike = model == name and slash and prefix in self.providers and "/" not in pattern
        return matches(model, [pattern]) and (not alike or pattern.startswith("*"))

    def resolve_alias(self, name: str) -> list[Target]:
        alias = self.config.models.get(name)
        names = (alias.target, *alias.fallback) if alias else ()
        pairs = [target.partition("/") for target in names]
        return [(p, model) for p, _, model in pairs if p in self.providers]

    def list_for(self, client: Client) -> dict[str, Any]:
        """What the caller may use, in the shape that both families of SDKs read."""
        offered = itertools.chain(*((*p.models, p.default_model) for p in self.providers.values()))
        exact = [name for name in offered if name and not WILDCARD.search(name)]
        listed = []
        for name in dict.fromkeys((*self.config.models, *built_in_prices(), *exact)):
            try:
                provider, model = self.resolve(name)[0]
            except ProxyError:  # nobody serves it
                continue
            if client.limits.templates_only or not client.may_use(name):
                continue
            price = self.prices.of(provider, model)
            usd = {"input": float(price.input), "output": float(price.output)} if price else None
            shape: dict[str, Any] = {"id": name, "object": "model", "type": "model"}
            shape |= {"display_name": name, "max_input_tokens": context_size(model)}
            shape |= {"created": 0, "created_at": "1970-01-01T00:00:00Z"}
            owner = "alias" if name in self.config.models else provider
            listed.append(shape | {"owned_by": owner, "price": usd})
        ends = {"first_id": listed[0]["id"], "last_id": listed[-1]["id"]} if listed else {}
        return {"object": "list", "data": listed, "has_more": False} | ends

    def template_targets(self) -> dict[str, list[Target]]:
        """Where each template goes. Raises ConfigError where one cannot be served."""
        targets = {}
        for name, template in self.config.templates.items():
            try:
                template_tools(template)
                targets[name] = self.resolve(template.model)
            except ProxyError as error:
                raise ConfigError(f"templates.{name}: {error.message}") from None
        return targets

    def check_prices(self) -> None:
        defaults = [(p, settings.default_model) for p, settings in self.providers.items()]
        aliases = map(self.resolve_alias, self.config.models)
        for provider, model in itertools.chain(defaults, *aliases, *self.templates.values()):
            if model and self.prices.of(provider, model) is None:
                raise ConfigError(f'prices."{model}": {unpriced(model)}')

    def unserved(self) -> Iterator[str]:
        """What to warn of: names that a client may ask for, and nobody serves."""
        for alias in self.config.models:
            if not self.resolve_alias(alias):
                yield f"models.{alias}: no provider of it has a key"
        tables: dict[str, Any] = {"jwt": self.config.jwt, "session": self.config.session}
        tables |= {f"clients.{name}": key for name, key in self.config.clients.items()}
        for path, table in tables.items():
            for name in table.models if table else ():
                if not (self.resolve_alias(name) or WILDCARD.search(name)):
                    try:
                        self.resolve(name)
                    except ProxyError as error:
                        yield f"{path}.models: {error.message}"

    def describe_room(self) -> str:
        """How many answers a day's budget can hold for at a time, where that is not enough."""
        total, limits, prices = self.config.budget.total_per_day, self.config.limits, []
        for name, price in built_in_prices().items():
            if any(matches(name, provider.models) for provider in self.providers.values()):
                prices.append((limits.max_tokens * price.output / 1_000_000, name))
        usd, name = max(prices, default=(Decimal(0), ""))
        if self.config.demo or usd * limits.concurrent_total <= total:
            return ""
        room = f"{int(total / usd)} answers at once of the dearest model ({name})"
        most = f"fewer than limits.concurrent_total = {limits.concurrent_total}"
        fix = "raise it, or lower limits.max_tokens"
        return f"budget.total_per_day: {total:f} USD are enough for {room}, {most}; {fix}"

    def bounds(self, request: Request, targets: list[Target], capped: bool) -> list[Bound]:
        """For each target the most USD that its input and tools can cost, and each token of its
        answer; empty without a budget. Raises 400 for what has no price."""
        for (tool, uses), (provider, _) in itertools.product(request.hosted, targets):
            if capped and not uses:
                wanted = "max_uses (or the request max_tool_calls) above 0: a budget holds for them"
                raise BadRequest(f"tools: {tool} runs at the vendor, and needs {wanted}")
            if self.prices.of(provider, tool, tool=True) is None:
                raise BadRequest(f"tools: {unpriced(tool, 'per_use, in USD for each time')}")
        bounds = []
        for provider, model in targets if capped else ():
            if (price := self.prices.of(provider, model)) is None:
                raise BadRequest(f"model: {unpriced(model)}")
            fixed, each = cost_bound(price, input_bound(request, model))
            bounds.append((fixed + self.prices.fee(provider, request), each))
        return bounds


# ---- Metrics and logs --------------------------------------------------------------------------
# Prometheus metrics in a registry of the app's own, and one log line per request to a model.
# Neither ever holds a prompt, an answer or a secret.

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300, 600)


class Metrics:
    NAMES = 200  # of clients and of models: whoever comes after that counts as "other"

    def __init__(self) -> None:
        self.registry = prometheus_client.CollectorRegistry()
        make: Any = functools.partial
        counter = make(prometheus_client.Counter, registry=self.registry)
        gauge = make(prometheus_client.Gauge, registry=self.registry, multiprocess_mode="livesum")
        histogram = make(prometheus_client.Histogram, registry=self.registry, buckets=SECONDS)
        served = ("provider", "model")
        self.requests = counter("proxy_requests", "By end", (*served, "outcome", "status"))
        self.duration = histogram("proxy_duration_seconds", "Whole requests", served)
        self.first_token = histogram("proxy_first_token_seconds", "Until the first token", served)
        self.upstream = histogram("proxy_upstream_seconds", "At the vendor", served)
        self.tokens = counter("proxy_tokens", "By kind", (*served, "kind"))
        self.cost = counter("proxy_cost_usd", "Spent at vendors", ("client", "model"))
        self.retries = counter("proxy_retries", "Attempts after the first", ("provider", "code"))
        self.timeouts = counter("proxy_timeouts", "Upstream deadlines passed", ("provider",))
        self.cache = counter("proxy_cache", "Cache results", ("result",))
        self.rejections = counter("proxy_rejections", "Requests refused by us", ("code",))
        self.streams = gauge("proxy_streams_in_flight", "Requests being answered")
        active = "Clients with a request being answered"
        self.clients = gauge("proxy_active_clients", active, multiprocess_mode="livemostrecent")
        self.waiting = gauge("proxy_waiting", "Requests in line for a place", ("provider",))
        self.seen: dict[str, set[str]] = {"client": set(), "model": set()}
        # prometheus_client checks and locks at every look-up
        self.of = functools.lru_cache(10_000)(lambda metric, *labels: metric.labels(*labels))

    def text(self) -> bytes:
        """For Prometheus: of all workers, where there are several."""
        registry, directory = self.registry, os.environ.get("PROMETHEUS_MULTIPROC_DIR")
        if directory:
            for file in Path(directory).glob("gauge_live*.db"):
                if not is_alive(int(file.stem.rpartition("_")[2])):
                    file.unlink(missing_ok=True)  # a dead worker's: stale for good
            registry = prometheus_client.CollectorRegistry()
            multiprocess = importlib.import_module("prometheus_client.multiprocess")
            multiprocess.MultiProcessCollector(registry, directory)
        return prometheus_client.generate_latest(registry)

    def show_places(self, clients: list[str]) -> None:
        """The client of each request being answered here. One may be at several workers."""
        self.streams.set(len(clients))
        known, directory = {*clients}, os.environ.get("PROMETHEUS_MULTIPROC_DIR")
        if directory:
            own = Path(directory, f"clients_{os.getpid()}")
            own.with_suffix(".new").write_bytes(msgspec.json.encode(known))
            own.with_suffix(".new").replace(own)  # atomically
            for file in own.parent.glob("clients_*[0-9]"):
                if is_alive(int(file.name.rpartition("_")[2])):
                    known |= msgspec.json.decode(file.read_bytes(), type=set[str])
        self.clients.set(len(known))

    def label(self, kind: str, name: str) -> str:
        if name not in self.seen[kind] and len(self.seen[kind]) >= self.NAMES:
            return "other"
        self.seen[kind].add(name)
        return name

    def count(self, entry: Entry, account: Account) -> None:
        rejected = entry.outcome == "rejected"
        # a name nobody has served is whatever a caller made up
        served = entry.provider, "" if rejected else self.label("model", entry.model)
        self.of(self.requests, *served, entry.outcome, str(entry.status)).inc()
        if rejected:
            self.of(self.rejections, entry.code).inc()
            return
        self.of(self.cache, entry.cache).inc()
        self.of(self.duration, *served).observe(entry.duration)
        if entry.ttfb is not None:
            self.of(self.first_token, *served).observe(entry.ttfb)
        if entry.attempts:
            self.of(self.upstream, *served).observe(account.seconds)
        for kind in ("input", "output", "cache_read", "cache_write", "reasoning"):
            if tokens := getattr(entry, f"{kind}_tokens"):
                self.of(self.tokens, *served, kind).inc(tokens)
        if entry.cost and entry.cost != "0":
            self.of(self.cost, self.label("client", entry.client), served[1]).inc(float(entry.cost))


def is_alive(process: int) -> bool:
    try:
        if sys.platform != "win32":  # where it would be a Ctrl-C
            os.kill(process, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)
    return True


class LogFormat(logging.Formatter):
    """JSON lines; on a terminal, lines for people. `"request %s", {...}` has its data in fields."""

    def __init__(self, terminal: bool, known: Iterable[str] = ()) -> None:
        super().__init__()
        self.terminal, self.known = terminal, tuple(known)

    def format(self, record: logging.LogRecord) -> str:
        level, event, fields = record.levelname.lower(), record.getMessage(), dict[str, Any]()
        if isinstance(record.args, Map):
            event, fields = record.msg.removesuffix(" %s"), {**record.args}
        if record.exc_info:
            fields["exception"] = redact(self.formatException(record.exc_info), self.known, 4000)
        if self.terminal:
            shown = (f"{name}={redact(str(value), length=4000)}" for name, value in fields.items())
            return " ".join((self.formatTime(record, "%H:%M:%S"), level, event, *shown))
        line = {"time": round(record.created, 3), "level": level, "event": event}
        return msgspec.json.encode(line | fields).decode()


# ---- Calls -------------------------------------------------------------------------------------
# A request's state, and what is sent to its caller when.


class Call:
    """One request from its arrival to its ledger row, and the caller's connection: whether more of
    its body may come (`sending`), or only after a 100 Continue (`expects`), when the last write
    began (`last_write`), and whether it is still under way (`writing`). Every reply has the headers
    `added`. `send` is the server's own: a wrapper would slow down each token. `route` is set where
    it may reach a vendor: the provider, or the kind of a native body."""

    request: Request
    writer: Writer
    filling: asyncio.Task[None]

    # a thousand streams have one each, and a dict of so many names is 1.5 KiB
    __slots__ = (
        "account", "added", "asked", "begun", "bounds", "caps", "client", "dialect", "dropped",
        "entry", "estimate", "expects", "failure", "filling", "finish", "flight", "forwarded",
        "headers", "held", "http1", "key", "last_write", "length_chosen", "most", "peer", "place",
        "rates", "request", "route", "send", "sending", "settled", "source", "started", "stopped",
        "task", "writer", "writing",
    )  # fmt: skip

    def __init__(
        self, entry: Entry, client: Client, scope: Scope, headers: Headers, added: Headers,
        receive: Receive, send: Send,
    ) -> None:  # fmt: skip
        self.entry, self.headers, self.source, self.send = entry, headers, receive, send
        body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
        self.sending, self.expects = body, "expect" in headers
        self.peer = str((scope.get("client") or ("unknown", 0))[0])
        self.http1 = scope.get("http_version", "").startswith("1")
        self.route: tuple[str, str] | None = None
        self.started, self.last_write = time.monotonic(), math.inf
        self.begun = self.writing = self.stopped = self.settled = self.length_chosen = False
        self.client, self.added, self.account = client, added, Account()
        self.dropped: list[str] = []
        self.rates: dict[str, str] = {}
        self.estimate, self.finish, self.dialect = 0, "", ""
        self.forwarded: dict[str, str] = {}
        self.caps: list[Cap] = []
        self.bounds: list[Bound] = []
        self.most = self.held = Decimal(0)  # what one attempt may cost, and what is set aside
        self.asked, self.key = False, ""  # whether the store knows it; its cache key
        self.place = ""  # the provider it has one at
        self.flight: Flight | None = None
        self.failure: ProxyError | None = None
        self.task: asyncio.Task[Any] = asyncio.current_task()  # type: ignore[assignment]

    def stop(self, error: ProxyError | None) -> None:
        """End the work from outside: with an error for the caller, or None where it has left."""
        if not (self.stopped or self.settled):
            self.stopped, self.failure = True, error
            self.task.cancel()

    def cost_of(self, tokens: int) -> Decimal:
        """The most USD that an answer of so many tokens can cost."""
        output = output_bound(tokens, self.request.n)
        return max(fixed + output * each for fixed, each in self.bounds)

    def most_output(self, error: ProxyError | None) -> int:
        """The most tokens of output that the last attempt may be billed for, ended by `error`."""
        most = output_bound(self.request.max_tokens, self.request.n)
        # one that went silent may have been writing all the time
        silent = isinstance(error, UpstreamError) and error.status == 504
        return most if silent or self.account.hidden else min(most, self.account.produced)

    def show_rates(self, given: Admission) -> None:
        limits = self.client.limits
        for kind, level, full, rate in (
            ("requests", given.requests, limits.burst, limits.requests_per_minute),
            ("tokens", given.tokens, limits.tokens_per_minute, limits.tokens_per_minute),
        ):
            self.rates[f"x-ratelimit-limit-{kind}"] = f"{rate:.15g}"
            self.rates[f"x-ratelimit-remaining-{kind}"] = str(max(0, int(level)))
            self.rates[f"x-ratelimit-reset-{kind}"] = f"{(full - level) * 60 / rate:.0f}s"

    def all_dropped(self) -> str:
        return ", ".join(dict.fromkeys(self.dropped + self.account.dropped))

    def own_id(self) -> Headers:
        """Anthropic's SDKs look for the id of a failed request under their vendor's name."""
        return {"request-id": self.added["x-request-id"]} if self.dialect == "messages" else {}

    async def begin(self, more: Headers) -> None:
        self.begun = True
        media_type = "application/json" if self.failure else self.writer.media_type
        headers = {"content-type": media_type, "x-dropped-params": self.all_dropped()}
        headers |= {"cache-control": "no-store", "x-accel-buffering": "no"} | self.rates
        headers |= self.account.headers
        self.rates = {}  # a long stream need not keep them
        raw = raw_headers(headers | {"x-cache": self.entry.cache} | more | self.added)
        status = self.entry.status or 200
        await self.send({"type": "http.response.start", "status": status, "headers": raw})

    async def receive(self) -> Any:
        self.expects = False
        message: Any = await self.source()
        self.sending = message.get("more_body", False)
        return message

    async def discard(self) -> None:
        """Before an error, read the rest of the body: a client whose connection breaks while it
        sends may never read the error, and a balancer would report a broken server."""
        if not (self.failure and self.sending):
            return
        left = self.started + self.client.limits.body_timeout - time.monotonic()
        try:
            async with asyncio.timeout(max(0, left)):
                while self.sending and not self.expects:
                    await self.receive()
        except TimeoutError:
            # until the server has let go of the read that was cancelled: where it does so only
            # after the reply, it never closes the connection
            await asyncio.sleep(0.1)
        if self.sending and self.http1:  # nothing can follow what was not read
            self.added["connection"] = "close"

    async def write(self, data: bytes, last: bool = False) -> None:
        self.last_write, self.writing = time.monotonic(), True
        await self.send({"type": "http.response.body", "body": data, "more_body": not last})
        self.writing = False

    async def deliver(self, batch: Batch) -> None:
        if batch:
            self.entry.ttfb = self.entry.ttfb or round(time.monotonic() - self.started, 4)
            self.finish = getattr(batch[-1], "reason", "")
        data = self.writer.write(batch, self.entry.ttfb or 0)
        if self.writer.early and not self.begun:
            await self.begin({})
        if data:
            await self.write(data)

    async def fill(self) -> None:
        if not self.begun:
            await self.begin({})
        await self.write(self.writer.filler)

    async def end(self) -> None:
        """The end of the reply: the rest of the answer, or the error."""
        entry, failure, account = self.entry, self.failure, self.account
        number = self.added["x-request-id"]
        if failure:
            whole = error_body(failure, number, self.dialect)
            data = self.writer.error(failure, number) if self.begun else whole
            more = self.own_id() | failure.headers
        elif self.finish:
            usd = None if entry.cost is None else float(entry.cost)
            report = {"requestId": number, "model": account.model or entry.model, "costUsd": usd}
            read, written = entry.input_tokens, entry.output_tokens
            estimate = Usage(input_tokens=read, output_tokens=written)
            usage = usage_fields(estimate if entry.estimated else account.usage)
            data = self.writer.end(self.finish, report | {"usage": usage})
            more = {"x-cost-usd": entry.cost or ""}
        else:
            return
        if not self.begun:
            await self.begin({"content-length": str(len(data or b""))} | more)
        if data is not None:  # else the missing end of the body says that it failed
            await self.write(data, last=True)


def raw_headers(headers: Headers) -> list[tuple[bytes, bytes]]:
    """As ASGI has them, without the empty ones."""
    return [(k.lower().encode(), v.encode("latin-1", "replace")) for k, v in headers.items() if v]


def usage_fields(usage: Usage) -> dict[str, int]:
    """Usage in both of the spellings that clients read."""
    counts = {"prompt": usage.input_tokens, "completion": usage.output_tokens}
    counts["total"] = sum(counts.values())
    both = {name + end: n for name, n in counts.items() for end in ("Tokens", "_tokens")}
    cached = {"cacheReadTokens": usage.cache_read_tokens, "reasoningTokens": usage.reasoning_tokens}
    return both | cached


# ---- Upstream ----------------------------------------------------------------------------------
# The vendors' keys, and one attempt at one target: the request, the answer, and what its failures
# mean.


class VendorKeys:
    """The keys of each provider, by name, used in turn; and the cooldowns (`rests`) of providers
    that asked for one and of keys rejected or over their rate. `tell` starts one at the other
    replicas, in seconds."""

    def __init__(self, keys: dict[str, dict[str, str]], tell: Callable[[str, float], None]) -> None:
        self.keys, self.tell = keys, tell
        self.rests: dict[str, float] = {}  # until when

    def names(self, provider: str) -> list[str]:
        """What may rest: the provider, or one of its keys."""
        return [provider, *self.keys[provider]]

    def merge(self, rests: Map[str, float]) -> None:
        now = time.monotonic()
        self.rests |= {name: now + seconds for name, seconds in rests.items()}

    def resting(self, provider: str) -> float:
        """For how many seconds a provider, or each of its keys, is still to be left alone."""
        keys = min(self.rests.get(name, 0) for name in self.keys[provider])
        return max(0, max(keys, self.rests.get(provider, 0)) - time.monotonic())

    def refuse(self, provider: str, deadline: float) -> ProxyError | None:
        """The error where a provider rests until after `deadline`."""
        now, wait = time.monotonic(), self.resting(provider)
        if not wait or now + wait < deadline:
            return None
        status = 529 if self.rests.get(provider, 0) > now else 429
        message = f"{provider} is left alone for {math.ceil(wait)} s more"
        return ProxyError(*UPSTREAM_CODES[status], message, after=wait)

    def choose(self, provider: str) -> str:
        """The first of its keys that does not rest, which is then moved behind the others."""
        keys, now = self.keys[provider], time.monotonic()
        name = min(keys, key=lambda name: max(now, self.rests.get(name, 0)))
        keys[name] = key = keys.pop(name)
        return key

    def rest(self, provider: str, key: str, error: UpstreamError) -> None:
        """Start the cooldown that a vendor asked for, at all replicas, or that of a key that is
        over its rate, or was rejected while another serves."""
        keys, seconds, now = self.keys[provider], error.wait, time.monotonic()
        name = next(name for name in keys if keys[name] == key)
        others = [other for other in keys if other != name and self.rests.get(other, 0) <= now]
        if error.status == 529:
            name = provider
        elif error.status == 429:
            seconds = seconds or (10 if len(keys) > 1 else None)
        elif error.code == "upstream_auth" and others and not error.forbidden:
            seconds = 60
        else:
            error.moved = error.forbidden and bool(others)
            return
        if seconds:
            # a 429 may be about one model: it must not keep the others away for long
            seconds = min(3600 if name == provider else 60, seconds)
            self.rests[name] = max(self.rests.get(name, 0), now + seconds)
            self.tell(name, seconds)
        error.moved = name != provider and not self.resting(provider) and bool(seconds)


parse_url = functools.lru_cache(100)(httpx.URL)


class Attempt:
    """One try at one target: sends the request, reads the answer, and closes the connection or,
    where the answer was complete, hands it back for the next one."""

    stream: Any = None
    waiting_since = math.inf
    silent = False

    def __init__(
        self, transport: Transport, config: Config, target: Target, key: str, call: Call
    ) -> None:
        self.transport, self.times = transport, config.upstream
        self.account, (provider, model) = call.account, target
        self.deadline, self.key = call.started + self.times.total, key
        self.began = time.monotonic() - self.account.seconds  # as if right after those before it
        self.task: asyncio.Task[Any] = asyncio.current_task()  # type: ignore[assignment]
        settings, self.request = config.providers[provider], call.request
        adapter = ADAPTERS[self.request.dialect or settings.adapter](settings, model)
        self.adapter, self.forwarded = adapter, call.forwarded
        self.headers: Headers = {}
        adapter.secret = self.key.encode()
        self.body = msgspec.json.encode(adapter.encode(self.request))
        self.cutter = StopCutter(adapter.cut) if adapter.cut else None

    async def open(self) -> Batch:
        """Send the request and wait for the vendor's first event."""
        accept = "text/event-stream" if self.request.stream else "application/json"
        headers = {"content-type": "application/json", "accept": accept}
        headers |= {"accept-encoding": "identity", "user-agent": f"proxy.py/{__version__}"}
        headers |= self.adapter.headers(self.key) | self.forwarded
        limits = {"timeout": {"connect": self.times.connect, "pool": self.times.connect}}
        body, self.body = self.body, b""  # a long stream need not keep it
        url = parse_url(self.adapter.url(self.request.path))
        request = httpx.Request("POST", url, headers=headers, content=body, extensions=limits)
        response = await self.transport.handle_async_request(request)
        self.stream = response.stream  # not the response: it would keep the request's body, too
        if response.status_code != 200:
            refused = await read_refusal(response)
            refused.headers |= self.vendor_headers(response)
            raise refused
        encoded = response.headers.get("content-encoding", "identity") != "identity"
        self.chunks = aiter(response.aiter_bytes() if encoded else self.stream)
        self.headers = self.vendor_headers(response)
        # without either, the end of the message looks like a connection that was cut
        self.framed = not {"transfer-encoding", "content-length"}.isdisjoint(response.headers)
        if not self.request.stream:
            return self.adapter.read(b"".join([chunk async for chunk in self.chunks]))
        passed, batch = b"", list[Event]()
        while not (batch or self.adapter.begun):  # comments and pings are passed on, but begin none
            heard = await self.next()
            passed += b"".join(event.data for event in heard if isinstance(event, Raw))
            batch = [event for event in heard if not isinstance(event, Raw)]
        if batch and isinstance(batch[0], Failure):
            raise batch[0].error
        return [Raw(passed), *batch] if passed else batch

    def vendor_headers(self, response: httpx.Response) -> Headers:
        """The vendor's headers for a caller that speaks its dialect."""
        names = ("request-id", "x-request-id", "openai-processing-ms")  # x-request-id is ours
        given = ((name.removeprefix("x-"), response.headers.get(name)) for name in names)
        known = {n: self.adapter.hide_key(v.encode()).decode() for n, v in given if v}
        return known if self.request.native is not None else {}

    async def next(self) -> Batch:
        """The events of one read."""
        self.waiting_since = time.monotonic()
        try:
            batch = self.adapter.feed(await anext(self.chunks))
        except StopAsyncIteration:
            if self.adapter.sse.buffer.lstrip()[:1] == b"{":  # no stream, but maybe an error
                self.adapter.read(self.adapter.sse.buffer)
                self.account.hidden = True  # a whole answer, and billed
                message = "the vendor answered in one piece, not with a stream"
                raise UpstreamError(502, message, advice="false") from None
            if not (self.framed and self.adapter.ended()):
                message = "the vendor ended the answer before it was complete"
                raise UpstreamError(502, message) from None
            batch = [*self.adapter.finish()]
        except asyncio.CancelledError:
            if not self.silent:
                raise
            self.task.uncancel()
            raise UpstreamError(504, "the vendor stopped in the middle of its answer") from None
        self.waiting_since = math.inf
        for event in batch:  # before the cut: what the caller does not get is billed, too
            if type(event) is Text or type(event) is Thinking:
                self.account.produced += len(event.text.encode())
        if self.adapter.complete:
            self.count_calls()
        return self.cutter.cut(batch) if self.cutter else batch

    def count_calls(self) -> None:
        """Add the bytes of tool calls, and those in no event."""
        for tool in self.adapter.calls.values():
            self.account.produced += len((tool.name + tool.arguments).encode())
        self.account.produced += self.adapter.unseen

    def check(self, now: float) -> None:
        """Once the answer has begun, end the wait for a vendor that has been silent for too long. A
        timeout around every read would add a tenth to the cost of a token."""
        overdue = now >= min(self.waiting_since + self.times.idle, self.deadline)
        if overdue and self.waiting_since < now and not self.silent:
            self.silent = True
            self.task.cancel()

    async def close(self) -> None:
        """The end of the HTTP message may come after the last event: only when it has been read
        can the connection serve again."""
        self.account.seconds = time.monotonic() - self.began
        if not self.adapter.complete:
            self.count_calls()
        if self.stream:
            try:
                if self.adapter.complete:
                    with contextlib.suppress(Exception):
                        async with asyncio.timeout(1):
                            async for _ in self.chunks:
                                pass
            finally:
                await self.stream.aclose()


async def read_refusal(response: httpx.Response) -> UpstreamError:
    body, error = b"", dict[str, Any]()
    async for chunk in response.aiter_bytes():
        if len(body := body + chunk) > 65536:
            break
    with contextlib.suppress(*NO_JSON, LookupError, TypeError):
        match read_json(body):
            case {"error": dict(found)} | [{"error": dict(found)}, *_]:
                error = found
            case {"error": str(message)} | {"message": str(message)} | {"detail": str(message)}:
                error = {"message": message}
            case {"detail": [wrong, *_]} | {"message": {"detail": [wrong, *_]}}:  # FastAPI's
                error = {"message": f"{wrong['loc'][-1]}: {wrong['msg']}"}
    message = str(error.get("message") or f"the vendor answered {response.status_code}")
    wait, advice = read_retry_after(response.headers), response.headers.get("x-should-retry", "")
    status, billed = response.status_code, response.status_code < 400
    status = 502 if status == 504 else status  # 504 is for deadlines of our own
    match error:
        case {"code": 403, "metadata": {"reasons": _}}:  # OpenRouter's: the prompt was flagged
            status = 400
    if status == 400 and re.match("incorrect api key|api key not valid", message, re.IGNORECASE):
        status = 401  # xAI's and Gemini's
    return UpstreamError(status, message, error, wait=wait, advice=advice, sent=billed)


def read_retry_after(headers: Map[str, str]) -> float | None:
    """Seconds, from milliseconds, seconds or a date."""
    milliseconds, after = headers.get("retry-after-ms"), headers.get("retry-after")
    with contextlib.suppress(ValueError):
        if milliseconds or after:
            return max(0.0, float(milliseconds) / 1000 if milliseconds else float(after or 0))
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, email.utils.parsedate_to_datetime(after or "").timestamp() - time.time())
    return None


def classify(error: BaseException) -> UpstreamError:
    """By its cause: the transport's own exception types mislead."""
    gone = "upstream_unreachable"
    match (isinstance(error, httpx.HTTPError) and error.__cause__) or error:
        case aiohttp.ClientConnectorError() | aiohttp.ConnectionTimeoutError():
            return UpstreamError(502, "the vendor cannot be reached", code=gone, sent=False)
        case TimeoutError():
            return UpstreamError(504, "the vendor did not answer in time")
        case aiohttp.ServerDisconnectedError() | aiohttp.ClientPayloadError() | OSError():
            return UpstreamError(502, "the connection to the vendor broke", code=gone)
    return UpstreamError(502, "the vendor's answer is not HTTP")


# ---- Proxy -------------------------------------------------------------------------------------
# The story of a request: one funnel, in one order, for every endpoint that can reach a vendor.

# The dialects that a provider understands, by its adapter: OpenAI has both of its own.
SPEAKS = {"messages": ("messages",), "responses": ("responses", "chat"), "chat": ("chat",)}


class Proxy:
    """What lives as long as the process: settings, stores, the upstream transport, and the calls
    being answered. create_app builds it, `running` opens and closes it."""

    transport: Transport
    ledger: Ledger | None = None
    draining = False
    unread = 0  # bytes of the bodies that are still coming
    parent = 0  # the process that ends this one, where there is one

    def __init__(self, config: Config, environ: Environ, public: bool, clock: Clock) -> None:
        self.config, self.clock = config, clock
        redis: dict[str, Any] = {}
        if config.redis.url:  # is it one, and the package there?
            redis = connect_redis(config.redis.url).connection_pool.connection_kwargs
        keys = vendor_keys(config, environ)
        self.keys = VendorKeys(keys, lambda name, seconds: self.store.rest(name, seconds))
        self.warnings = check_exposure(config, environ, public)
        tables = (config.server, config.budget, config.jwt or Jwt(), config.session or Session())
        settings = itertools.chain(*(asdict(table).items() for table in tables))
        set_here = [text for name, text in settings if name.endswith(("_token", "secret"))]
        vendors = itertools.chain(*(by_name.values() for by_name in keys.values()))
        self.secrets = (*vendors, *set_here, redis.get("password") or "")
        self.clients, self.metrics = Clients(config, environ, public), Metrics()
        capped = any(client_caps(kind, config.budget, 0) for kind in self.clients.kinds())
        self.capped = capped and not config.demo
        self.catalog = Catalog(config, keys, self.capped)
        self.warnings += self.catalog.unserved()
        self.webhook = Webhook(config.budget.webhook, config.budget.webhook_secret)
        self.store: Store = MemoryStore(time.monotonic, self.webhook.tell, config.cache)
        self.replicas: RedisStore | None = None
        self.lines: dict[str, Line] = {}
        # weak: whoever leads or reads a flight keeps it alive
        self.flights: weakref.WeakValueDictionary[str, Flight] = weakref.WeakValueDictionary()
        self.leading: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        self.live: set[Call] = set()
        self.reading: set[Attempt] = set()
        self.rejected_rows = Bucket(60, 10_000, 10_000, time.monotonic())

    @contextlib.asynccontextmanager
    async def running(self, transport: Transport, http: httpx.AsyncClient) -> AsyncIterator[None]:
        for warning in self.warnings:
            LOG.warning("%s", warning)
        if room := self.catalog.describe_room():
            LOG.info("%s", room)
        self.transport, table = transport, self.config.ledger
        self.http = self.clients.http = http
        shared, tell = bool(self.config.redis.url), self.webhook.tell
        try:
            if shared or table.path:
                self.ledger = ledger = Ledger(table, self.clock, shared)
                if shared:
                    self.store = self.replicas = RedisStore(self.config, tell, ledger)
                    await self.replicas.open()
                else:
                    spent = read_spending(ledger.database, self.clock())
                    self.store = MemoryStore(time.monotonic, tell, self.config.cache, spent)
        except ConfigError as error:  # of a worker nobody else says it
            LOG.error("%s", error)
            raise
        for name, provider in self.config.providers.items():
            if provider.max_concurrent:
                self.lines[name] = Line(self.store, name, provider)
        works = (self.webhook.run(http), self.keep_showing(), self.keep_checking())
        tasks = [asyncio.create_task(work) for work in works]
        try:
            yield
        finally:
            self.stop_calls()
            if calls := [call.task for call in self.live]:
                await asyncio.wait(calls, timeout=5)
            for task in (*tasks, *(line.calling for line in self.lines.values())):
                if task:
                    task.cancel()
            if self.replicas:
                await self.replicas.close()
            await http.aclose()  # and with it the vendors' connections
            if self.ledger:
                await asyncio.to_thread(self.ledger.close)

    def now(self) -> float:
        """Seconds since 1970, by the clock that all replicas go by."""
        return self.clock() + self.store.offset

    async def serve(self, call: Call, provider: str, kind: str) -> None:
        """The story of a request."""
        try:
            self.check_open(call, provider)
            call.client = client = await self.clients.identify(call.peer, call.headers)
            entry = call.entry
            entry.client, entry.group, entry.session = client.id, client.group, client.session
            await self.check_places(call)
            try:  # in no variable of ours: a long stream need not keep the body
                targets = self.read(call, provider, kind, await read_body(call, self))
            except (ProxyError, RecursionError, asyncio.CancelledError):
                await self.admit(call)  # a body not taken is a request, too
                raise
            await self.work(call, targets)
        except ProxyError as error:
            call.failure = error
        except asyncio.CancelledError:  # the caller left, or call.stop has set the failure
            call.task.uncancel()
        except RecursionError:  # what can just be read may be too deep to be written
            call.failure = BadRequest("body (JSON): is nested too deeply")
        except Exception:
            LOG.exception("a request failed unexpectedly")
            call.failure = ProxyError(500, "internal_error", "internal error")
        try:
            await self.settle(call)
        finally:
            self.live.discard(call)

    def check_open(self, call: Call, provider: str) -> None:
        if self.config.server.paused:
            raise ProxyError(503, "paused", "the proxy is paused by its owner", retry=False)
        if not hasattr(self, "transport"):
            message = "the proxy does not run: the host's lifespan must enter app.lifespan()"
            raise ProxyError(503, "not_running", message, retry=False)
        if self.draining:
            raise Stopping
        if provider and provider not in self.catalog.providers:
            known = ", ".join(f"/api/{name}" for name in self.catalog.providers)
            wrong = "has no key" if provider in self.config.providers else "is not configured"
            message = f"provider {redact(provider)!r} {wrong}; there is {known}"
            raise ProxyError(404, "not_found", message)
        call.entry.provider = provider
        check_media_type(call.headers)

    async def check_places(self, call: Call) -> None:
        """Take one of the client's and of the server's places, from before the body to the end."""
        client, limits, taken = call.client, call.client.limits, self.places()
        part = self.replicas.local.part if self.replicas and not self.replicas.link.up else int
        full = len(taken) >= part(self.config.limits.concurrent_total)
        if full or taken.count(client.id) >= part(limits.concurrent):
            with contextlib.suppress(StoreAway):
                call.show_rates(await self.store.admit(Ask("", client.id, limits, 0)))
            raise refusal(Admission(refused="busy" if full else "concurrent"), limits)
        self.live.add(call)

    def places(self) -> list[str]:
        """The client of each request that has a place."""
        return [call.client.id for call in self.live if not call.settled]

    def read(self, call: Call, provider: str, kind: str, body: bytes) -> list[Target]:
        """Read the body, find the model, and estimate the tokens."""
        raw = decode_body(body, call.client.limits)
        read = self.read_native if kind else self.read_plain
        targets = read(call, kind or provider, raw)
        call.length_chosen = not raw.get("template") and any(raw.get(name) for name in MAX_TOKENS)
        self.check_request(call, targets)
        return targets

    def read_plain(self, call: Call, provider: str, raw: dict[str, Any]) -> list[Target]:
        """A browser's body."""
        limits, default = call.client.limits, self.config.providers[provider].default_model
        request = parse_body(raw, limits, call.dropped, default, self.config.templates)
        call.request, stream = request, raw.get("stream") is not False
        call.writer = (FrameWriter if stream else Writer)(bool(request.thinking))
        targets = self.catalog.templates.get(raw.get("template") or "")
        return targets or self.catalog.resolve(request.model, provider)

    def read_native(self, call: Call, kind: str, raw: dict[str, Any]) -> list[Target]:
        """The body of an official SDK, for the vendors that speak its dialect. A Chat body is
        translated where the model lives elsewhere."""
        limits, dialect = call.client.limits, kind.partition("/")[0]
        targets = self.catalog.resolve(str(raw.get("model") or ""))
        dialect = dialect if dialect in ADAPTERS else "chat"
        called = bool(raw.get("tools") or raw.get("functions"))

        def is_own(target: Target) -> bool:
            adapter, can = self.config.providers[target[0]].adapter, capability(target[1])
            elsewhere = ("elsewhere" in can and called) or ("only" in can and adapter != "chat")
            return dialect in SPEAKS[adapter] and not (kind == "chat" and elsewhere)

        own, provider = [*filter(is_own, targets)], self.config.providers[targets[0][0]]
        if targets[0] in own:
            targets = own  # those of another dialect could not answer
            allowed = set.intersection(*({*self.config.providers[name].allow} for name, _ in own))
            request = parse_native(raw, kind, limits, allowed, call.dropped)
            request.dialect = dialect
            call.forwarded = forwarded_headers(call.headers, dialect, allowed)
            call.writer = NativeWriter(dialect, request.stream)
        elif kind == "chat":
            request = parse_body(raw, limits, call.dropped, chat=True)
            asked = (raw.get("stream_options") or {}).get("include_usage") is True
            call.writer = ChatWriter(request.model, raw.get("stream") is True, asked)
        else:
            home = provider.adapter
            place = "/v1/chat/completions" + ("" if home == "chat" else f" and /v1/{home}")
            raise BadRequest(f"model: {redact(targets[0][1])} is served at {place}, not here")
        call.request = request
        return targets

    def check_request(self, call: Call, targets: list[Target]) -> None:
        """May this caller use the model, and do its tokens fit into a minute?"""
        client, request, limits = call.client, call.request, call.client.limits
        # an alias by its name, any other model by its own: "openai/gpt-5" is no o*
        alias = self.catalog.resolve_alias(request.model)
        if not client.may_use(request.model if alias else targets[0][1]):
            allowed = f"this caller may use {', '.join(client.models)}"
            message = f"model: {allowed}, not {redact(request.model)!r}"
            raise ProxyError(403, "model_not_allowed", message)
        call.entry.provider, call.entry.model = targets[0]
        asked, tokens = request.measure(), request.max_tokens * request.n
        estimate = asked.characters // 4 + 1000 * (asked.images + asked.documents) + tokens
        if estimate > limits.tokens_per_minute:
            allowed = f"{limits.tokens_per_minute} a minute are allowed; send less"
            raise BadRequest(f"max_tokens: about {estimate} tokens are needed, {allowed}")
        call.estimate = estimate
        caps = client_caps(client, self.config.budget, call.entry.time)
        call.caps = [] if self.config.demo or request.counts_tokens else caps
        call.bounds = self.catalog.bounds(request, targets, bool(call.caps))
        call.most = call.cost_of(request.max_tokens) if call.bounds else call.most

    async def work(self, call: Call, targets: list[Target]) -> None:
        """Fetch and deliver the answer, while a second task watches for a disconnect."""
        gone = asyncio.create_task(watch_disconnect(call))
        call.last_write = time.monotonic()
        try:
            async with aclosing(await self.source(call, targets)) as batches:
                call.headers = {}  # a long stream need not keep them
                async for batch in batches:
                    await call.deliver(batch)
                    if call.finish:  # the caller need not wait for the vendor's connection
                        return await self.settle(call)
        finally:
            call.last_write = math.inf
            gone.cancel()

    async def source(self, call: Call, targets: list[Target]) -> Batches:
        """Where the answer comes from: the cache, another request's flight, or the vendor."""
        if "no-cache" in call.headers.get("cache-control", "") or not self.config.cache.enabled:
            await self.admit(call, targets)
            return self.upstream(call, targets)
        scope = "" if self.config.cache.shared else call.client.id
        version = [call.forwarded.get(f"anthropic-{name}") for name in ("version", "beta")]
        call.key = key = sha256(repr((scope, targets, call.request, version, call.length_chosen)))
        async with self.leading.setdefault(key, asyncio.Lock()):  # so that only one holds money
            flight = self.flights.get(key)
            if flight and flight.readers and not flight.task.done():
                flight.readers += 1  # the others may leave while the store is asked
                try:
                    await self.admit(call)
                finally:
                    flight.leave()
                call.entry.cache, call.account = "coalesced", flight.account
                return flight.read()
            given = await self.admit(call, targets)
            while given.pending:  # another replica will have it soon
                await asyncio.sleep(0.1)
                if time.monotonic() > call.started + self.config.upstream.first_byte / 2:
                    call.key = ""  # it takes too long: this one goes by itself
                given = await self.admit(call, targets, again=True)
            if given.answer:
                account = msgspec.msgpack.decode(given.answer, type=Account)
                call.entry.cache, call.account = "hit", account
                return replay(account.batches)
            call.entry.cache = "miss"
            flight = Flight(self.upstream(call, targets, key), call.account)
            call.flight = self.flights[key] = flight
        return flight.read()

    async def admit(
        self, call: Call, targets: list[Target] | None = None, again: bool = False
    ) -> Admission:
        """Take what a request needs before it may go to `targets`; without them, only its rates.
        Raises 402, 429 or 503."""
        client, limits = call.client, call.client.limits
        ask = Ask(call.entry.id, client.id, limits, 1, call.estimate, again=again)
        if targets:
            ask.caps, ask.most, ask.key = call.caps, call.most, call.key
            short = min(256, call.request.max_tokens)
            ask.least = call.most if call.length_chosen or not call.caps else call.cost_of(short)
            ask.provider, line = targets[0][0], self.lines.get(targets[0][0])
            ask.places = line.places if line and not line.turns else 0
            if self.replicas:
                ask.rests = [name for p, _ in targets for name in self.keys.names(p)]
                died = replace(call.entry, outcome="error", code="proxy_died", estimated=True)
                ask.row = msgspec.json.encode(died)
        call.asked = True
        given = await self.store.admit(ask)
        self.keys.merge(given.rests)
        if not again:
            call.show_rates(given)
        if given.refused or given.exceeded:
            call.estimate = call.estimate if again else 0  # taken the first time
            raise given.exceeded or refusal(given, limits)
        call.place = ask.provider if given.placed else ""
        if ask.caps and given.answer is None and not given.pending:
            await self.note_hold(call, given.held)
        return given

    async def note_hold(self, call: Call, held: Decimal) -> None:
        """Write what a request holds into its row, still open, should the process die."""
        call.held += held
        call.entry.cost, call.entry.outcome = f"{call.held:f}", "open"
        if self.ledger and call.held and not self.replicas:
            await self.ledger.record(call.entry)
        if call.held < call.most:  # lower a max_tokens that the caller did not choose
            request = call.request
            left = ((call.held - fixed, each * request.n) for fixed, each in call.bounds if each)
            affordable = (int(usd / each) for usd, each in left)
            request.max_tokens = min(affordable, default=request.max_tokens)
            call.most = call.held
            call.dropped.append("max_tokens")

    async def upstream(self, call: Call, targets: list[Target], key: str = "") -> Batches:
        """The vendor's answer, from its first batch to its end. A whole one is kept under `key`."""
        account = call.account
        attempt, batch = await self.connect(call, targets)
        call.request.forget()
        try:
            self.reading.add(attempt)
            while True:
                account.seconds = time.monotonic() - attempt.began
                account.usage = attempt.adapter.usage
                last = batch[-1] if batch else None
                if type(last) is Failure:
                    yield batch[:-1]
                    raise last.error
                yield batch
                if type(last) is Finish:
                    if key and last.reason in ("stop", "tool_calls"):  # batches has all of it now
                        self.store.put(key, msgspec.msgpack.encode(account))
                    return
                batch = await attempt.next()
        except Exception as failed:
            raise self.explain(failed, account.provider) from None
        finally:
            self.reading.discard(attempt)
            await attempt.close()

    async def connect(self, call: Call, targets: list[Target]) -> tuple[Attempt, Batch]:
        """An attempt whose answer has begun, and its first batch, after retries and fallbacks."""
        times, now = self.config.upstream, time.monotonic
        # an answer in one piece begins when it is complete
        first_byte = min(times.first_byte, times.total)
        deadline = call.started + (first_byte if call.request.stream else times.total)
        error: ProxyError | None = None
        for left, target in zip(range(len(targets), 0, -1), targets, strict=True):
            # while other targets are left, this one gets its share of the time
            limit = now() + (deadline - now()) / left
            soon = min(limit, call.started + first_byte)
            rest_end = soon if left == 1 else 0  # with a vendor that rests
            try:
                await self.take_place(call, target[0], soon, rest_end)
                return await self.try_target(call, target, error, limit, rest_end)
            except UpstreamError as failed:
                error = failed
                if failed.status in (400, 413, 422):  # the request itself: no other does better
                    break
            except ProxyError as failed:  # it rests, has no place, or cannot be asked this
                error = error or failed
        raise error or UpstreamError(504, "the vendor did not answer in time")

    async def take_place(self, call: Call, provider: str, limit: float, rest_end: float) -> None:
        """Wait in line for one of the provider's places, where they are counted, until `limit`.
        Raises 503; or 429 or 529, where it would rest until after `rest_end`."""
        if resting := self.keys.refuse(provider, rest_end):
            raise resting
        if provider == call.place:
            return
        if call.place:  # what failed needs its place no longer
            await self.store.leave(call.entry.id, call.place)
            call.place = ""
        if line := self.lines.get(provider):
            seconds = min(self.config.providers[provider].queue_timeout, limit - time.monotonic())
            await line.enter(call.entry.id, call.client.id, seconds)
            call.place = provider

    async def try_target(
        self, call: Call, target: Target, error: ProxyError | None, limit: float, rest_end: float
    ) -> tuple[Attempt, Batch]:
        """Try one of the targets until its answer begins, after `error` at the one before. Raises
        the error of the last attempt."""
        account, now, (provider, model) = call.account, time.monotonic, target
        failure: UpstreamError | None = None
        doubted: list[tuple[str, UpstreamError]] = []
        retry, wait, other_keys = 0, 0.0, len(self.keys.keys[provider]) - 1
        while True:
            if resting := self.keys.refuse(provider, rest_end):
                raise failure or resting
            await asyncio.sleep(max(wait, self.keys.resting(provider)))
            attempt = Attempt(self.transport, self.config, target, self.keys.choose(provider), call)
            if error := failure or error:
                await self.hold_again(call, provider, model, error)
            self.count_attempt(call, attempt, provider, model)
            try:
                async with asyncio.timeout(limit - now()):
                    batch = await attempt.open()
            except BaseException as failed:
                await attempt.close()
                failure = self.explain(failed, provider)
                if call.request.native is None:
                    failure.param = ""  # the caller may never have sent such a field
                self.add_lost(call, failure)
                self.keys.rest(provider, attempt.key, failure)
                doubted += [(attempt.key, failure)] if failure.forbidden else []
            else:
                for other, forbidden in doubted:  # this key works: so those keys were at fault
                    forbidden.forbidden = False
                    self.keys.rest(provider, other, forbidden)
                account.headers = attempt.headers
                if not call.request.stream:  # its text is not read
                    account.produced += sum(len(e.data) for e in batch if isinstance(e, Raw))
                return attempt, batch
            if failure.moved and other_keys:
                wait, other_keys = 0, other_keys - 1
                continue
            retry += 1
            wait = retry if failure.wait is None else failure.wait
            useless = not failure.retryable or retry == self.config.upstream.attempts
            if useless or now() + wait >= limit:
                raise failure

    async def hold_again(self, call: Call, provider: str, model: str, error: ProxyError) -> None:
        """Hold money for the failed attempts, which may be billed, and for the next one. Raises
        `error` where there is not enough."""
        more, client = call.account.lost + call.most - call.held, call.client
        if call.caps and more > 0:
            ask = Ask(call.entry.id, client.id, client.limits, 0, 0, call.caps, more, more)
            try:
                given = await self.store.admit(replace(ask, again=True))
            except StoreAway:
                raise error from None
            if given.refused or given.exceeded:
                raise error
            await self.note_hold(call, given.held)
        self.metrics.retries.labels(provider, error.code).inc()
        # not the vendor's message, which may repeat what it was asked
        fields = {"id": call.entry.id, "provider": provider, "model": model, "after": error.code}
        LOG.info("retry %s", fields)

    def count_attempt(self, call: Call, attempt: Attempt, provider: str, model: str) -> None:
        """Count an attempt as billed until known otherwise, even if the caller leaves."""
        account = call.account
        account.attempts += 1
        account.provider, account.model = provider, model
        account.dropped = attempt.adapter.dropped
        account.bound, account.hour = input_bound(call.request, model), b'"1h"' in attempt.body
        # thinking that is not shown, or only its summary, is billed all the same
        request, native = call.request, call.request.native or {}
        asked = attempt.adapter.thinking
        values = [native.get(name) for name in ("thinking", "reasoning", "reasoning_effort")]
        sent_off = request.thinking is False and "on" in attempt.adapter.can  # else it is not sent
        off = sent_off or any(value in UNTHINKING for value in values)
        own = capability(model.rpartition("/")[2])  # resellers prefix the maker
        thinks = "always" in own or (not off and (own & {"on", "unseen"} or asked or any(values)))
        account.hidden = bool(thinks) or not request.stream
        account.billed = True

    def explain(self, failed: BaseException, provider: str) -> UpstreamError:
        """The error to show the caller; anything but a vendor's failure is raised again."""
        if isinstance(failed, httpx.HTTPError | aiohttp.ClientError | OSError | UnicodeError):
            failed = classify(failed)
        if not isinstance(failed, UpstreamError):
            raise failed
        for name in ("message", "vendor_code", "param"):
            setattr(failed, name, redact(getattr(failed, name), self.secrets))
        if failed.status == 504:
            self.metrics.timeouts.labels(provider).inc()
        return failed

    def add_lost(self, call: Call, error: UpstreamError) -> None:
        """Add what a failed attempt may be billed all the same."""
        account, request = call.account, call.request
        account.billed = False
        price = self.catalog.prices.of(account.provider, account.model)
        fee = self.catalog.prices.fee(account.provider, request)
        if error.sent and price:
            fixed, each = cost_bound(price, account.bound)
            account.lost += fixed + fee + each * call.most_output(error)
        account.produced = 0

    async def settle(self, call: Call) -> None:
        """Account for a request, once, and then end its reply."""
        if call.flight and not call.finish:  # it pays, even if it leaves before the others
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait((call.flight.task,))
        if call.settled:
            return
        call.settled = True
        self.account_for(call)
        await self.record(call)
        await call.discard()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(5):
                await call.end()

    def account_for(self, call: Call) -> None:
        """How a request has ended and what it cost: for its row, the metrics and the log."""
        entry, failure = call.entry, call.failure
        entry.duration = round(time.monotonic() - call.started, 4)
        if failure:
            ours = not call.account.attempts and failure.status != 500
            entry.outcome = "rejected" if ours else "error"
            entry.status, entry.code = failure.status, failure.code
        elif call.finish:
            entry.outcome, entry.status = OUTCOMES[call.finish], 200
        else:
            entry.outcome, entry.status, entry.code = "cancelled", 499, "client_left"
        try:
            self.charge(call)
            self.metrics.count(entry, call.account)
            self.log(call)
        except Exception:  # a figure gone wrong must not take the answer with it
            LOG.exception("a request could not be accounted for")

    def charge(self, call: Call) -> None:
        """The row's usage and cost: the vendor's figures, or else an upper bound: the bytes of the
        input, and those of the output received, or max_tokens where some is hidden."""
        entry, account, usage = call.entry, call.account, call.account.usage
        if entry.cache in ("hit", "coalesced") or not account.attempts:
            entry.cost = "0"
            return
        if account.billed and not usage.known and not call.request.counts_tokens:
            entry.estimated = True
            inputs = max(usage.input_tokens, account.bound)
            output = max(usage.output_tokens, call.most_output(call.failure))
            usage = replace(usage, input_tokens=inputs, output_tokens=output)
        for name in Counts.__struct_fields__:
            setattr(entry, name, getattr(usage, name))
        entry.provider, entry.model = account.provider, account.model
        entry.attempts = account.attempts
        prices, provider = self.catalog.prices, account.provider
        price = prices.of(provider, account.model)
        usd = cost(usage, price)
        if usd is not None and entry.estimated:  # all input may be cache writes
            tokens = usage.input_tokens
            read = Usage(input_tokens=tokens, output_tokens=usage.output_tokens)
            written = replace(read, cache_write_tokens=tokens)
            written.cache_write_1h_tokens = tokens if account.hour else 0
            usd = max(cost(kind, price) or Decimal(0) for kind in (read, written))
        searches = None if entry.estimated else usage.web_searches
        fee = prices.fee(provider, call.request, searches) if account.billed else 0
        entry.cost = None if usd is None else f"{(usd + fee + account.lost).normalize():f}"
        if call.request.counts_tokens:
            entry.cost = "0"

    def log(self, call: Call) -> None:
        fields = asdict(call.entry) | {"dropped": call.all_dropped(), "time": None}
        fields["cost"] = call.entry.cost and float(call.entry.cost)
        LOG.info("request %s", {k: v for k, v in fields.items() if v})

    async def record(self, call: Call) -> None:
        """The ledger's row, and the end of all that the request has in the store."""
        entry, usd, row = call.entry, Decimal(call.entry.cost or 0), b""
        written: Awaitable[Any] | None = None
        if self.ledger and (call.held or self.worth_a_row(entry)):
            written = self.ledger.record(entry) if self.ledger.path else None
            row = msgspec.json.encode(entry) if self.replicas else b""
        if call.asked or row:
            unused = call.estimate and call.estimate - entry.input_tokens - entry.output_tokens
            who = entry.id, entry.client, call.client.limits
            await self.store.settle(Settlement(*who, unused, usd, call.caps, row))
        if written:
            await written

    def worth_a_row(self, entry: Entry) -> bool:
        """Rejected requests have a rate limit: a flood must not fill the disk."""
        if entry.model and entry.outcome != "rejected":
            return True
        worth = self.rejected_rows.refill(time.monotonic()) >= 1
        self.rejected_rows.level -= worth
        return worth

    async def keep_checking(self) -> None:
        """Check all calls and attempts, until cancelled: cheaper than a timer for each."""
        times, ping = self.config.upstream, self.config.server.ping
        while True:
            await asyncio.sleep(max(0.01, min(0.5, ping / 8, times.idle / 8, times.total / 8)))
            now = time.monotonic()
            for call in self.live:
                self.check(call, now)
            for attempt in self.reading:
                attempt.check(now)
            if self.parent and os.getppid() != self.parent:  # it was killed, and cannot stop us
                self.parent = 0
                os.kill(os.getpid(), signal.SIGTERM)

    def check(self, call: Call, now: float) -> None:
        """Keep a silent reply alive, and end one that the caller takes nothing more of."""
        silence, ping = now - call.last_write, self.config.server.ping
        if call.writing and silence >= self.config.upstream.idle:
            call.stop(None)
        elif not call.writing and silence >= ping:
            # filler fixes the status at 200, so an answer in one piece waits longer: for its first
            # event or the end of all attempts, within the 30 s that routers allow; and without
            # limit while it is queued, or its vendor rests
            first = 0 if call.entry.ttfb else min(28, self.config.upstream.first_byte + 1)
            late = call.account.attempts and not call.writer.early
            if call.begun or (late and silence >= max(ping + 5, first)):
                call.last_write = now
                call.filling = asyncio.create_task(call.fill())

    async def keep_showing(self) -> None:
        """Publish the gauges, for another worker may be asked for them. And write to a ledger whose
        disk was full: where a balancer goes by /ready, no request comes to try it."""
        while True:
            if self.config.server.workers > 1:
                with contextlib.suppress(OSError):
                    self.show_places()
            if self.ledger and not self.ledger.healthy:
                await self.ledger.write()
            await asyncio.sleep(1)

    def show_places(self) -> None:
        self.metrics.show_places(self.places())
        for name, line in self.lines.items():
            self.metrics.waiting.labels(name).set(line.waiting())

    def drain(self) -> None:
        """Accept no more requests, and let those that run finish."""
        self.draining = True
        for line in self.lines.values():
            line.close()

    def stop_calls(self) -> None:
        for call in self.live:
            call.stop(Stopping())

    async def identify(self, call: Call) -> Admission:
        """Identify the caller of what needs no vendor, and count it. Raises 401, 403 or 429."""
        headers = call.headers
        if "origin" not in headers and headers.get("sec-fetch-site") == "cross-site":
            message = "a page of another site must ask with CORS, as fetch() does"
            raise ProxyError(403, "origin_not_allowed", message)
        call.client = client = await self.clients.identify(call.peer, call.headers)
        return await self.take(call, client.id)

    async def take(self, call: Call, whose: str) -> Admission:
        """Count a request that needs no vendor. Raises 429."""
        given = await self.store.admit(Ask("", whose, call.client.limits))
        call.show_rates(given)
        if given.refused:
            raise refusal(given, call.client.limits)
        return given

    async def used_today(self, client: str) -> Totals:
        if self.replicas:
            return await self.replicas.used(client)
        rows, midnight = [], self.clock() // 86400 * 86400
        if self.ledger and self.ledger.path:
            path = self.ledger.path
            rows = await asyncio.to_thread(read_ledger, path, midnight, "day", client)
        return rows[0] if rows else Totals()

    async def new_session(self, call: Call) -> dict[str, Any]:
        """Exchange a proof, a Turnstile token or the app's JWT, for a session token."""
        table, headers = self.config.session, call.headers
        if table is None:
            raise ProxyError(404, "not_found", "sessions are off: a [session] block turns them on")
        check_media_type(headers)
        few: Any = {"requests_per_minute": table.per_minute, "burst": table.per_minute}
        limits = replace(self.config.limits, **few, max_body=Size(65536))
        parent = replace(self.clients.by_address(call.peer, headers), limits=limits)
        call.client = parent
        await self.take(call, f"session {parent.id}")
        proof = convert_body(await read_body(call, self), SessionRequest)
        if proof.turnstile and table.turnstile_secret:
            address = self.clients.address(call.peer, headers)
            await self.check_turnstile(proof.turnstile, address, table)
        elif (user := await self.clients.by_jwt(read_token(headers))) is None:
            message = "send a Turnstile token as `turnstile`, or the app's JWT as a bearer token"
            if not table.turnstile_secret:
                message = "turnstile: is off here; send the app's JWT as a bearer token"
            raise ProxyError(401, "invalid_key", message, retry=False)
        else:
            parent = user
        call.entry.client, call.entry.outcome, call.entry.status = parent.id, "ok", 200
        self.log(call)
        return self.clients.new_session(parent, headers.get("origin", ""))

    async def check_turnstile(self, token: str, address: str, table: Session) -> None:
        """Raises 403 where the token is not good, or not for the first time."""
        wrong = "turnstile: the token is not valid"
        refused = ProxyError(403, "challenge_failed", wrong, retry=False)
        if not await self.store.once(token, 600):
            raise refused
        form = {"secret": table.turnstile_secret, "response": token, "remoteip": address}
        try:
            reply = await self.http.post(table.siteverify_url, data=form)
            verdict = reply.raise_for_status().json()
            good, codes = verdict.get("success") is True, str(verdict.get("error-codes"))
            if "secret" in codes or "internal-error" in codes:  # no fault of the token
                raise ValueError(codes)
        except (httpx.HTTPError, aiohttp.ClientError, OSError, ValueError, AttributeError) as error:
            LOG.error("session.siteverify_url: no verdict (%s)", redact(repr(error), self.secrets))
            await self.store.once(token, 0)
            message = "the challenge cannot be checked now"
            raise ProxyError(503, "identity_unavailable", message, after=5) from None
        if not good:
            raise refused


def refusal(given: Admission, limits: Limits) -> ProxyError:
    match given.refused:
        case "busy":
            return ProxyError(503, "busy", "the server is at its limit; try again", after=1)
        case "concurrent":
            message = f"{limits.concurrent} requests at a time are allowed; let one end"
            return ProxyError(429, "too_many_streams", message, after=1)
    message = f"too many {given.refused}; try again in {math.ceil(given.wait)} s"
    return ProxyError(429, "rate_limited", message, after=given.wait)


def check_media_type(headers: Headers) -> None:
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ProxyError(415, "not_json", "Content-Type: must be application/json")
    if headers.get("content-encoding", "identity").strip().lower() not in ("identity", ""):
        raise ProxyError(415, "not_json", "Content-Encoding: send the body as it is")


async def read_body(call: Call, proxy: Proxy) -> bytes:
    limits, declared = call.client.limits, call.headers.get("content-length", "")
    body, more = bytearray(), True
    size = int(declared[:20]) if declared.isdecimal() else 0
    try:
        async with asyncio.timeout(limits.body_timeout):
            while more and max(size, len(body)) <= limits.max_body:
                message = await call.receive()
                if message["type"] == "http.disconnect":
                    raise asyncio.CancelledError  # as if it left later
                body += (chunk := message.get("body", b""))
                proxy.unread += len(chunk)
                more = call.sending
                if proxy.unread > 64 * proxy.config.limits.max_body:
                    raise ProxyError(503, "busy", "too many large bodies; try again", after=1)
    except TimeoutError:
        text = f"body: not complete after {limits.body_timeout:g} s"
        raise ProxyError(408, "body_timeout", text) from None
    finally:
        proxy.unread -= len(body)
    if max(size, len(body)) > limits.max_body:
        raise ProxyError(413, "body_too_large", f"body: larger than {limits.max_body} bytes")
    return bytes(body)


async def watch_disconnect(call: Call) -> None:
    while (await call.receive())["type"] != "http.disconnect":
        pass
    call.stop(None)


async def replay(batches: list[Batch]) -> Batches:
    for batch in batches:
        yield batch


def open_connections() -> aiohttp.ClientSession:
    """A cookie jar would replay one caller's cookies to the next, so there is none."""
    tls = httpx.create_ssl_context(trust_env=False)
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=30, ssl=tls),
        cookie_jar=aiohttp.DummyCookieJar(), max_line_size=65536, max_field_size=65536,
        skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
    )  # fmt: skip


# ---- Demo --------------------------------------------------------------------------------------
# A vendor inside the process: it answers the real request of an adapter with the bytes that vendor
# would send, at a believable pace. Only the network is missing.

DEMO_HINT = """Demo: no vendor is called, and costs are what they would be. Begin the prompt with
/tool, /think (and show thinking), /long, /error or /cut to see that kind of answer."""
DEMO_TEXT = """Hello! This answer comes from the demo provider inside proxy.py: no vendor was called
and nothing was spent. Everything else is real, from the request your page sent to the tokens you
are reading. """
DEMO_THOUGHT = "The person wants to see thinking. I think a little, then I answer. "

# Parts of an answer: "text", "thinking" or the name of a tool, and its pieces.
Pieces = list[tuple[str, list[str]]]
Json = dict[str, Any]


def demo_bytes(events: list[Json], whole: Json, stream: bool) -> list[bytes]:
    if not stream:
        return [msgspec.json.encode(whole)]
    return [b"event: %b\n%b" % (event["type"].encode(), frame(event)) for event in events]


def demo_messages(answer: Pieces, counted: Json, stream: bool, reason: str) -> list[bytes]:
    """An answer of Anthropic's, as events or in one piece."""
    message: Json = {"id": "msg_demo", "type": "message", "role": "assistant", "model": "demo"}
    message |= {"content": [], "stop_reason": None, "stop_sequence": None, "usage": counted}
    events: list[Json] = [{"type": "message_start", "message": message}]
    content: list[Json] = []
    for index, (kind, pieces) in enumerate(answer):
        delta, name, whole = f"{kind}_delta", kind, "".join(pieces)
        start: Json = {"type": kind, kind: ""} | ({"signature": ""} if kind == "thinking" else {})
        block: Json = start | {kind: whole}
        if kind not in ("text", "thinking"):
            delta, name = "input_json_delta", "partial_json"
            start = {"type": "tool_use", "id": f"toolu_{index}", "name": kind, "input": {}}
            block = start | {"input": msgspec.json.decode(whole)}
        at = {"index": index}
        events.append({"type": "content_block_start", **at, "content_block": start})
        deltas = ({"type": delta, name: piece} for piece in pieces)
        events += [{"type": "content_block_delta", **at, "delta": each} for each in deltas]
        events.append({"type": "content_block_stop", **at})
        content.append(block)
    reasons = {"length": "max_tokens", "tool_calls": "tool_use"}
    end = {"stop_reason": reasons.get(reason, "end_turn")}
    events.append({"type": "message_delta", "delta": end, "usage": counted})
    events.append({"type": "message_stop"})
    return demo_bytes(events, message | end | {"content": content}, stream)


def demo_responses(answer: Pieces, counted: Json, stream: bool, reason: str) -> list[bytes]:
    response: Json = {"id": "resp_demo", "object": "response", "created_at": 0, "model": "demo"}
    response |= {"parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "output": []}
    events: list[Json] = [{"type": "created", "response": response | {"status": "in_progress"}}]
    output: list[Json] = []
    for index, (kind, pieces) in enumerate(answer):
        item: Json = {"id": f"item_{index}", "status": "completed"}
        match kind:
            case "text":
                item |= {"type": "message", "role": "assistant"}
                name, holds, shell = "output_text", "content", "content_part"
                part: Json = {"type": "output_text", "annotations": []}
            case "thinking":
                item |= {"type": "reasoning"}
                name, holds, shell = "reasoning_summary_text", "summary", "reasoning_summary_part"
                part = {"type": "summary_text"}
            case _:
                item |= {"type": "function_call", "call_id": f"call_{index}", "name": kind}
                name, holds, shell, part = "function_call_arguments", "arguments", "", {}
        whole = "".join(pieces)
        end = {"text": whole} if part else {"arguments": whole, "name": kind}
        added = item | {holds: [] if part else ""}
        output.append(item | {holds: [part | {"text": whole}] if part else whole})
        place: Json = {"output_index": index}
        at: Json = place | {"item_id": item["id"]} | ({f"{holds}_index": 0} if part else {})
        first = {"type": f"{shell}.added", **at, "part": part | {"text": ""}}
        last = {"type": f"{shell}.done", **at, "part": part | {"text": whole}}
        deltas = [{"type": f"{name}.delta", **at, "delta": piece} for piece in pieces]
        deltas.append({"type": f"{name}.done", **at, **end})
        events.append({"type": "output_item.added", **place, "item": added})
        events += [first, *deltas, last] if part else deltas
        events.append({"type": "output_item.done", **place, "item": output[-1]})
    status = "incomplete" if reason == "length" else "completed"
    response |= {"status": status, "output": output}
    response |= {"usage": counted | {"total_tokens": sum(counted.values())}}
    if reason == "length":
        response["incomplete_details"] = {"reason": "max_output_tokens"}
    events.append({"type": status, "response": response})
    for number, event in enumerate(events):
        event |= {"type": f"response.{event['type']}", "sequence_number": number}
    return demo_bytes(events, response, stream)


def demo_chat(answer: Pieces, counted: Json, stream: bool, reason: str) -> list[bytes]:
    writer, data = ChatWriter("demo", stream, show_usage=True), list[bytes]()
    for kind, pieces in answer:
        events: Batch = [Text(piece) for piece in pieces]
        if kind != "text":
            whole = ToolUse("call_0", kind, "".join(pieces))
            events = [*map(Thinking, pieces)] if kind == "thinking" else [whole]
        data += [writer.write([event], 0) for event in events]
    data.append(writer.end(reason, {"usage": usage_fields(Usage(**counted))}))
    return data if stream else [b"".join(data)]


DEMOS = {"messages": demo_messages, "responses": demo_responses, "chat": demo_chat}


def demo_answer(request: httpx.Request) -> httpx.Response:
    body, path = msgspec.json.decode(request.content), request.url.path
    turns = body.get("messages") or body.get("input")
    last = turns[-1] if isinstance(turns, list) else turns
    last = last if isinstance(last, dict) else {"content": last}
    *_, prompt = "", *strings(last.get("content", last.get("output")))
    dialect = next((name for name, a in ADAPTERS.items() if path.endswith(a.path)), "")
    if prompt.startswith("/error") or not dialect:
        status, kind = (529, "overloaded_error") if dialect else (404, "not_found_error")
        words = "The demo model is overloaded" if dialect else "The demo only answers prompts"
        error = {"type": kind, "message": words}
        return httpx.Response(status, json={"type": "error", "error": error})
    tool = (body.get("tools") or [{"name": "get_weather"}])[0]
    answer: Pieces = [("text", [f"{word} " for word in DEMO_TEXT.split()])]
    reason, most = "stop", next((body[name] for name in MAX_TOKENS if body.get(name)), None)
    match prompt.split()[:1]:
        case ["/long"]:
            answer[0][1][:] *= 20
        case ["/think"]:
            answer.insert(0, ("thinking", [f"{word} " for word in DEMO_THOUGHT.split()]))
        case ["/tool"]:
            name = (tool.get("function") or tool).get("name", "get_weather")
            answer = [("text", ["Let me ", "see. "]), (name, ['{"city":', '"Paris"}'])]
            reason = "tool_calls"
    if most and most < sum(len(pieces) for _, pieces in answer):
        answer, reason = [(answer[0][0], answer[0][1][:most])], "length"
    counted = {"input_tokens": 25, "output_tokens": sum(len(pieces) for _, pieces in answer)}
    data = DEMOS[dialect](answer, counted, bool(body.get("stream")), reason)
    return httpx.Response(200, content=demo_pace(data[: 12 if prompt.startswith("/cut") else None]))


async def demo_pace(data: list[bytes]) -> AsyncIterator[bytes]:
    for piece in data:
        yield piece
        await asyncio.sleep(0.03)


# ---- Page --------------------------------------------------------------------------------------
# A small page to try the proxy with. Model text reaches it only through textContent.

PAGE_SCRIPT = """
const $ = id => document.getElementById(id), provider = $("provider"), model = $("model");
const usual = () => provider.selectedOptions[0].dataset.model;
let controller;
$("stop").onclick = () => controller.abort();
(provider.onchange = () => {
  model.value = "";
  model.placeholder = usual() || "its name";
  model.setAttribute("list", "models-" + provider.value);
})();
$("prompt").onkeydown = ({key, ctrlKey, metaKey}) => {
  if (key === "Enter" && (ctrlKey || metaKey)) $("form").requestSubmit();
};
$("form").onsubmit = async event => {
  event.preventDefault();
  controller?.abort();
  const mine = controller = new AbortController();
  $("stop").disabled = false;
  const answer = $("answer"), facts = $("facts"), started = performance.now();
  answer.textContent = "";
  facts.textContent = "waiting…";
  const headers = {"Content-Type": "application/json"};
  if ($("key").value) headers.Authorization = "Bearer " + $("key").value;
  const body = JSON.stringify({model: model.value || usual(), enable_thinking: $("think").checked,
    messages: [{role: "user", content: $("prompt").value}]});
  try {
    const reply = await fetch("api/" + provider.value,
      {method: "POST", headers, body, signal: mine.signal});
    if (!reply.ok) throw new Error((await reply.json()).error);
    const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let part, first, rest = ""; !(part = await reader.read()).done;) {
      if (mine !== controller) return;
      const lines = (rest + part.value).split("\\n");
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("error: ")) throw new Error(JSON.parse(line.slice(7)).message);
        if (!line.startsWith("data: {")) continue;
        const {token, toolCalls, costUsd, usage, finishReason} = JSON.parse(line.slice(6));
        facts.textContent = first ??= `first token ${Math.round(performance.now() - started)} ms`;
        answer.textContent += token;
        for (const {function: tool} of toolCalls ?? [])
          answer.textContent += `\\n→ ${tool.name}(${tool.arguments})`;
        const cost = costUsd === null ? "unknown" : "$" + costUsd?.toFixed(6);
        if (usage) facts.textContent =
          [first, `${usage.totalTokens} tokens`, `cost ${cost}`, finishReason].join(" · ");
      }
    }
  } catch (error) {
    if (mine !== controller) return;
    facts.textContent = error.name === "AbortError" ? "stopped" : "Error: " + error.message;
  }
  $("stop").disabled = true;
};
"""
PAGE_STYLE = """
body { font: 16px system-ui; max-width: 44rem; margin: 2rem auto; padding: 0 1rem }
textarea, pre { width: 100%; box-sizing: border-box; font: inherit; white-space: pre-wrap }
label { display: inline-block; margin: 0 1em .5em 0 }
button { font: inherit; padding: .4em 1em }
"""


def csp_hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


PAGE_CSP = (
    f"default-src 'none'; script-src {csp_hash(PAGE_SCRIPT)}; style-src {csp_hash(PAGE_STYLE)}; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def render_page(proxy: Proxy) -> str:
    prices, providers, lists = built_in_prices(), "", ""
    for name, settings in proxy.catalog.providers.items():
        sold = [] if settings.models == ("*",) else [m for m in prices if prices[m].output]
        offered = [model for model in sold if matches(model, settings.models)]
        cheapest = min(offered, key=lambda model: prices[model].output, default="")
        usual = html.escape(settings.default_model or cheapest)
        providers += f'<option data-model="{usual}">{name}</option>'
        options = (f"<option>{html.escape(m)}</option>" for m in (*proxy.config.models, *offered))
        lists += f'<datalist id="models-{name}">{"".join(options)}</datalist>'
    hint = DEMO_HINT if proxy.config.demo else "Send a prompt to a configured model."
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>proxy.py</title>
<meta name="viewport" content="width=device-width"><style>{PAGE_STYLE}</style>
<h1>proxy.py</h1><p>{hint}</p><form id="form" autocomplete="off">
<label>Provider <select id="provider">{providers}</select></label>
<label>Model <input id="model"></label>{lists}
<label><input type="checkbox" id="think"> show thinking</label>
<label>Key <input id="key" type="password" placeholder="where one is needed"></label>
<p><textarea id="prompt" aria-label="Prompt" rows="4" required autofocus>Say hello.</textarea></p>
<button id="send">Send</button> <button id="stop" type="button" disabled>Stop</button>
</form><pre id="answer"></pre><p id="facts" role="status"></p><script>{PAGE_SCRIPT}</script></html>
"""


# ---- HTTP --------------------------------------------------------------------------------------
# The edge that every request passes, the routes, and the app that holds them.

EXPOSED = (
    "X-Request-ID, X-Cache, X-Cost-USD, X-Dropped-Params, X-Demo, Retry-After, x-should-retry, "
    "x-ratelimit-limit-requests, x-ratelimit-remaining-requests, x-ratelimit-reset-requests, "
    "x-ratelimit-limit-tokens, x-ratelimit-remaining-tokens, x-ratelimit-reset-tokens, "
    "request-id, openai-processing-ms"
)


class App(litestar.Litestar):
    """Litestar behind the edge: ids, origin checks and CORS apply to every request, even where no
    route matches."""

    proxy: Proxy

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await super().__call__(scope, receive, send)
        call, allowed = self.open_call(scope, receive, send)
        if not allowed:
            fix = "its owner can add it to server.cors_origins"
            message = f"origin {redact(call.headers['origin'])} may not call this proxy; {fix}"
            call.entry.client = self.proxy.clients.by_address(call.peer, call.headers).id
            call.failure = ProxyError(403, "origin_not_allowed", message)
            LOG.info("refused %s", {"origin": redact(call.headers["origin"])})
            return await self.proxy.settle(call)
        await self.find_route(call, scope, receive)
        if call.route:  # out here, so that a long stream does not keep Litestar's objects
            await self.proxy.serve(call, *call.route)

    async def find_route(self, call: Call, scope: Any, receive: Any) -> None:
        """Have Litestar answer, or set `call.route` for what may reach a vendor."""

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                await call.discard()
                more = raw_headers(call.rates | call.added)
                message["headers"] = [*message.get("headers", ()), *more]
            await call.send(message)

        if scope["method"] == "OPTIONS" and "access-control-request-method" in call.headers:
            await preflight(call.headers)(scope, receive, send)
        else:  # a state of our own: where we are mounted, the host's is not ours to write in
            await super().__call__(scope | {"state": {"call": call}}, receive, send)

    def open_call(self, scope: Any, receive: Any, send: Any) -> tuple[Call, bool]:
        """Our record of the request, and whether its origin may call."""
        headers, clients = read_headers(scope), self.proxy.clients
        given = headers.get("x-request-id", "").partition(",")[0].strip()
        given = given if re.fullmatch(r"[\x21-\x7e]{1,128}", given) else ""
        id, origin = secrets.token_hex(12), headers.get("origin")
        allowed = origin is None or clients.origin_allowed(origin, headers.get("host", ""))
        added = {"x-request-id": given or id, "x-content-type-options": "nosniff"}
        added |= {"x-demo": "true" if self.proxy.config.demo else "", "vary": "Origin"}
        if origin and allowed:
            added["access-control-allow-origin"] = origin
            added["access-control-expose-headers"] = EXPOSED
        entry = Entry(self.proxy.now(), id, given)
        call = Call(entry, clients.client(""), scope, headers, added, receive, send)
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if "/v1/" in path:  # the shape of all errors
            anthropic = "/v1/messages" in path or "anthropic-version" in headers
            call.dialect = "messages" if anthropic else "chat"
        return call, allowed


def preflight(headers: Headers) -> ASGIResponse:
    """Allow the headers that were asked for: SDKs send a dozen of their own."""
    allowed = {"access-control-allow-methods": "GET, POST", "access-control-max-age": "600"}
    asked = headers.get("access-control-request-headers", "")
    if re.fullmatch(r"[\w!#$%&'*+.^`|~, -]{1,2000}", asked, re.ASCII):
        allowed["access-control-allow-headers"] = asked
    return ASGIResponse(status_code=204, headers=allowed)


def error_response(request: litestar.Request[Any, Any, Any], error: Exception) -> Any:
    """Errors of the routes themselves; Proxy.serve answers for its own."""
    if isinstance(error, HTTPException):
        code = "not_found" if error.status_code == 404 else "invalid_request"
        known = error.headers or {}  # of a 405, the methods that are allowed
        unserved = {404: "nothing is here; models are at /api/PROVIDER and /v1", 405: "see Allow"}
        detail = unserved.get(error.status_code, error.detail)
        error = ProxyError(error.status_code, code, f"{request.method}: {detail}")
        error.headers |= known
    elif not isinstance(error, ProxyError):
        LOG.error("a route failed unexpectedly", exc_info=error)
        error = ProxyError(500, "internal_error", "internal error")
    call, app = request.scope["state"]["call"], request.app
    call.failure = error
    call.entry.client = call.entry.client or call.client.id
    if isinstance(app, App):
        app.proxy.account_for(call)
    body = error_body(error, call.added["x-request-id"], call.dialect)
    headers = error.headers | call.own_id()
    return litestar.Response(
        body, status_code=error.status, media_type="application/json", headers=headers
    )


NATIVE_PATHS = {"/v1/chat/completions": "chat"}
NATIVE_PATHS |= {f"/v1/{kind}": kind for kind in NATIVE_FIELDS if kind != "chat"}


async def no_answer(scope: Scope, receive: Receive, send: Send) -> None:
    """Sends nothing: App.__call__ serves the request after Litestar."""


def create_app(
    config: Config, environ: Environ = os.environ, *, public: bool = True,
    standalone: bool = False, transport: Transport | None = None, clock: Clock = time.time,
) -> App:  # fmt: skip
    """The application; opens nothing. Raises ConfigError.

    `public` is False only where nobody but this machine can connect. `standalone` lets it end the
    process after a signal; mounted in another app, enter `app.lifespan()` in the host's lifespan.
    """
    # a proxy in front of a loopback bind means that others get in
    proxy = Proxy(config, environ, public or bool(config.server.trusted_proxies), clock)

    @litestar.post(["/api/{provider:str}", *NATIVE_PATHS])
    async def ask(scope: Scope, provider: FromPath[str] = "") -> ASGIApp:
        scope["state"]["call"].route = provider, NATIVE_PATHS.get(scope["path_template"], "")
        return no_answer

    @litestar.get(["/v1/models", "/v1/models/{name:path}"])
    async def models(scope: Scope, name: FromPath[str] = "") -> dict[str, Any]:
        call = scope["state"]["call"]
        await proxy.identify(call)
        listed, name = proxy.catalog.list_for(call.client), name.removeprefix("/")
        found = [model for model in listed["data"] if model["id"] == name]
        if name and not found:
            message = f"model: {redact(name)!r} is not listed at /v1/models"
            raise ProxyError(404, "not_found", message)
        return found[0] if name else listed

    @litestar.route(["/health", "/healthz", "/livez"], http_method=["GET", "HEAD"])
    async def health() -> dict[str, Any]:
        return {"status": "ok", "version": __version__, "demo": config.demo}

    @litestar.route(["/ready", "/readyz"], http_method=["GET", "HEAD"])
    async def ready() -> litestar.Response[Any]:
        written = not proxy.ledger or proxy.ledger.healthy
        shared = proxy.replicas
        good = written and not proxy.draining and (not shared or shared.serving(proxy.capped))
        body = {"status": "ready" if good else "not ready", "ledger": written}
        body |= {"draining": proxy.draining} | ({"redis": bool(shared.link.up)} if shared else {})
        return litestar.Response(body, status_code=200 if good else 503)

    @litestar.get("/metrics")
    async def metrics(scope: Scope) -> litestar.Response[bytes]:
        call, token = scope["state"]["call"], config.server.admin_token
        known = token and hmac.compare_digest(sha256(read_token(call.headers)), sha256(token))
        if not known and not proxy.clients.trusted(call.peer, call.headers):
            message = "metrics need server.admin_token as `Authorization: Bearer TOKEN`"
            raise ProxyError(401, "invalid_key", message, retry=False)
        proxy.show_places()
        return litestar.Response(proxy.metrics.text(), media_type="text/plain; version=0.0.4")

    @litestar.get("/usage")
    async def usage(scope: Scope) -> dict[str, Any]:
        call = scope["state"]["call"]
        taken = await proxy.identify(call)
        client, limits = call.client, call.client.limits
        spent = await proxy.used_today(client.id)
        caps = [c for c in client_caps(client, config.budget, proxy.now()) if c.scope != "all"]
        used = await proxy.store.spent(caps)
        return {
            "client": client.id,
            "today": {"requests": spent.requests, "costUsd": float(spent.cost),
                      "inputTokens": spent.input_tokens, "outputTokens": spent.output_tokens},
            "left": {"requests": int(taken.requests), "tokens": int(taken.tokens),
                     "requestsPerMinute": limits.requests_per_minute,
                     "tokensPerMinute": limits.tokens_per_minute},
            "budget": [
                {"scope": cap.scope, "window": cap.window, "limitUsd": float(cap.limit),
                 "leftUsd": float(max(cap.limit - usd, Decimal(0))), "resetsAt": cap.resets()}
                for cap, usd in zip(caps, used, strict=True)],
        }  # fmt: skip

    @litestar.get("/openapi.json")
    async def document() -> dict[str, Any]:
        return describe(proxy.catalog.providers)

    @litestar.post("/session", status_code=200)
    async def session(scope: Scope) -> dict[str, Any]:
        return await proxy.new_session(scope["state"]["call"])

    @litestar.get("/")
    async def page(scope: Scope) -> litestar.Response[str]:
        call = scope["state"]["call"]
        if not (proxy.clients.trusted(call.peer, call.headers) or config.server.page):
            raise ProxyError(404, "not_found", "the page is off: server.page = true serves it")
        csp = {"content-security-policy": PAGE_CSP}
        return litestar.Response(render_page(proxy), media_type="text/html", headers=csp)

    @contextlib.asynccontextmanager
    async def lifespan(_: litestar.Litestar) -> AsyncIterator[None]:
        real = transport or httpx_aiohttp.AiohttpTransport(client=open_connections)
        vendors = httpx.MockTransport(demo_answer) if config.demo and not transport else real
        async with proxy.running(vendors, httpx.AsyncClient(transport=real, timeout=5)):
            if standalone:
                stop_on_signals(proxy)
            yield

    app = App(
        [ask, models, session, health, ready, metrics, usage, document, page],
        exception_handlers={Exception: error_response}, openapi_config=None, logging_config=None,
        lifespan=[lifespan],
    )  # fmt: skip
    app.proxy = proxy
    return app


def describe(providers: Iterable[str]) -> dict[str, Any]:
    """The app as an OpenAPI document."""
    json, place = "application/json", "#/components/schemas/{name}"
    bodies = (Body, SessionRequest, ErrorBody)
    shapes, components = msgspec.json.schema_components(bodies, ref_template=place)
    content: list[dict[str, Any]] = [{"content": {json: {"schema": shape}}} for shape in shapes]
    ask, proof, error = content
    ask["required"] = proof["required"] = True

    def operation(summary: str, *media: str, **more: Any) -> dict[str, Any]:
        good = {"description": "OK", "content": {kind: {} for kind in media or (json,)}}
        replies = {"200": good, "default": {"description": "An error"} | error}
        return {"summary": summary, "responses": replies} | more

    one_of = {"name": "provider", "in": "path", "required": True, "schema": {"enum": [*providers]}}
    bearer, ready = {"type": "http", "scheme": "bearer"}, operation("Ready for requests?")
    ready["responses"]["503"] = {"description": "Not ready", "content": {json: {}}}
    return {
        "openapi": "3.1.0", "info": {"title": "proxy.py", "version": __version__},
        "paths": {
            "/api/{provider}": {"post": operation(
                "Ask a model", "text/event-stream", json, parameters=[one_of], requestBody=ask)},
            "/session": {"post": operation("A proof for a short-lived token", requestBody=proof)},
            "/usage": {"get": operation("What the caller has used and has left")},
            "/health": {"get": operation("Alive?")},
            "/ready": {"get": ready},
            "/metrics": {"get": operation("Prometheus metrics", "text/plain")},
        },
        "components": {"schemas": components, "securitySchemes": {"bearer": bearer}},
        "security": [{"bearer": []}, {}],
    }  # fmt: skip


def stop_on_signals(proxy: Proxy) -> None:
    """On SIGTERM Granian lets running requests finish, without a time limit. So after `drain` those
    left are ended with an error, and 3 s later the process exits, even if a half-sent request or a
    stalled reader would keep it.

    A second signal can block a Granian worker for good, and Ctrl-C or a platform sends two: one to
    each process, and one from Granian's main process to its worker. So only the first SIGTERM gets
    through, and no SIGINT: the main process turns that into a SIGTERM. One that comes before the
    event loop runs would be lost: `serve` blocks it until then."""
    loop, drain = asyncio.get_running_loop(), proxy.config.server.drain
    if threading.current_thread() is not threading.main_thread():
        return
    server = signal.getsignal(signal.SIGTERM)

    def leave() -> None:
        if proxy.ledger:
            proxy.ledger.close()
        os._exit(0)

    def begin() -> None:
        proxy.drain()
        loop.call_later(drain, proxy.stop_calls)
        loop.call_later(drain + 3, leave)

    def handle(number: int, frame: Any) -> None:
        # not in the loop's table: what Granian has there may still be to run
        signal.signal(number, signal.SIG_IGN)
        loop.call_soon_threadsafe(begin)
        if callable(server):
            server(number, frame)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, handle)
    if proxy.parent and hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # our server heard it, too
    if hasattr(signal, "pthread_sigmask"):
        loop.call_later(0.2, signal.pthread_sigmask, signal.SIG_UNBLOCK, {signal.SIGTERM})


# ---- Command line ------------------------------------------------------------------------------
# One line and exit code 2 for what is wrong; otherwise Granian serves until a signal.


def __getattr__(name: str) -> Any:
    """`granian --interface asgi proxy:app` works; importing the module builds nothing."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()["app"] = app = load_app(load_config(), public=True)
    return app


def load_app(config: Config, public: bool, server: int = 0) -> App:
    """Runs in a Granian worker; at module level, so that a spawned process can import it. `server`
    is the process that `serve` runs in, which may be the worker's own."""
    app = create_app(config, public=public, standalone=True)
    app.proxy.parent = os.getppid() if server not in (0, os.getpid()) else 0
    set_up_logging(config.server.log_level, app.proxy.secrets)
    gc.freeze()  # what lasts need not be scanned by each collection
    return app


def set_up_logging(level: str, known: Iterable[str] = ()) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LogFormat(sys.stderr.isatty(), known))
    LOG.handlers, LOG.propagate = [handler], False
    LOG.setLevel(level.upper())


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    name, about = Path(__file__).name, "Let code in a browser call language models."
    parser = argparse.ArgumentParser(prog=name, description=about)
    add = parser.add_argument
    add("--host", help="address to bind (127.0.0.1, or 0.0.0.0 where PORT is set)")
    add("--port", type=int, help="port to bind (PORT, or 8000)")
    add("--workers", type=int, help="worker processes (1)")
    add("--config", type=Path, help="settings file (config.toml beside this file)")
    add("--check", action="store_true", help="print what is configured, open and missing; exit")
    add("--demo", action="store_true", help="answer from a built-in model instead of the vendors")
    add("--version", action="version", version=f"{name} {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    add = commands.add_parser("usage", help="print what was used, from the ledger").add_argument
    add("--since", default="7d", help="how far back, like 12h (%(default)s)")
    add("--by", choices=GROUPS, default="day", help="one row each (%(default)s)")
    add("--json", action="store_true", help="print JSON instead of a table")
    add = commands.add_parser("key", help="make a key for a client, and its block").add_argument
    add("name", help="letters, digits, - and _")
    return parser.parse_args(arguments)


def new_key(name: str) -> str:
    if not re.fullmatch(r"[\w-]{1,64}", name, re.ASCII):
        raise ConfigError(f"{name!r}: use letters, digits, - and _")
    key = f"pk-{secrets.token_urlsafe(32)}"
    return f"""\
The key, shown this once; the client sends it as `Authorization: Bearer KEY`:

{key}

For config.toml; without the block, from the next start on, the key is no longer good:

[clients.{name}]
key_sha256 = "{sha256(key)}"
"""


def main(arguments: list[str] | None = None) -> int:
    options, code = parse_arguments(arguments), 0
    set_up_logging("info")
    try:
        config = configure(options, os.environ)
        set_up_logging(config.server.log_level)
        public = not is_loopback(config.server.host)
        if options.command == "usage":
            print(show_usage(config, options), flush=True)
        elif options.command == "key":
            print(new_key(options.name), flush=True)
        elif options.check:
            code = print_check(config, os.environ, public)
        else:
            serve(config, public)
    except BrokenPipeError:  # the reader has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ConfigError, OSError) as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        return 2
    return code


def configure(options: argparse.Namespace, environ: Environ) -> Config:
    given: dict[str, Any] = {}
    if options.demo:
        given = {"demo": True, "server.host": "127.0.0.1"}
    elif environ.get("PORT"):
        given = {"server.host": "0.0.0.0"}  # a PaaS says so
    named = {name: getattr(options, name) for name in ("host", "port", "workers")}
    given |= {f"server.{name}": value for name, value in named.items() if value is not None}
    config = load_config(options.config, environ, **given)
    if config.server.workers == 1 or config.redis.url:
        return config
    reason = "limits are in one process's memory"
    if options.workers is not None or not environ.get("WEB_CONCURRENCY"):
        raise ConfigError(f"server.workers: {reason}; set REDIS_URL for more than 1")
    LOG.warning("WEB_CONCURRENCY is ignored: %s; with REDIS_URL it counts", reason)
    return replace(config, server=replace(config.server, workers=1))


def check_port(host: str, port: int) -> str:
    """The address to bind. A second Granian on it would start without a word and split traffic."""
    try:
        family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
    except (OSError, UnicodeError) as error:
        fix = "choose others with --host and --port"
        raise ConfigError(f"server.port: cannot bind {host}:{port} ({error}); {fix}") from None
    return str(place[0])


def check_files(streams: int) -> None:
    with contextlib.suppress(ImportError):  # on Windows
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        if resource.RLIM_INFINITY != most < (wanted := 2 * streams + 100):
            fix = f"raise the hard limit (ulimit -Hn {wanted}), or lower limits.concurrent_total"
            LOG.warning("%d files may be open, too few for %d streams: %s", most, streams, fix)


class Interrupt:
    """Replaces the Event that Granian's main thread waits for. An Event has a lock: the handler of
    a second signal would deadlock in the thread that holds it; and signals that reach another
    thread do not wake a main thread that waits for a lock."""

    raised = False

    def __init__(self, server: Any) -> None:
        self.server = server

    def set(self) -> None:
        self.raised = True

    def clear(self) -> None:
        self.raised = False  # Granian is about to replace a dead worker
        LOG.error("a worker has died, and another one takes its place")

    def wait(self) -> None:
        while not (self.raised or self.server.interrupt_signal):
            time.sleep(0.1)


def serve(config: Config, public: bool) -> None:
    from granian import Granian
    from granian.constants import HTTPModes, Interfaces
    from granian.http import HTTP1Settings

    # fail here: what a worker says is not shown
    balanced = create_app(config, public=public).proxy.clients.proxies
    shared = bool(config.redis.url)
    with contextlib.closing(Ledger(config.ledger, time.time, shared)) as ledger:
        if not shared:  # else what others write waits for it
            read_spending(ledger.database, time.time())
    server, places = config.server, max(1024, 2 * config.limits.concurrent_total)
    check_files(config.limits.concurrent_total)
    address = check_port(server.host, server.port)
    LOG.info("serving http://%s:%s", f"[{address}]" if ":" in address else server.host, server.port)
    granian: Any = Granian(
        "proxy", address=address, port=server.port, interface=Interfaces.ASGI, websockets=False,
        http=HTTPModes.http1, workers=server.workers,
        backlog=places, backpressure=places,  # of connections; beyond it the next client hangs
        # so a client that is silent for 10 s, in a head or between two requests, is disconnected;
        # not so a balancer, which takes a closed connection for a failure
        http1_settings=HTTP1Settings(header_read_timeout=620_000 if balanced else 10_000),
        log_enabled=False, respawn_failed_workers=True, workers_kill_timeout=int(server.drain) + 5,
    )  # fmt: skip
    granian.main_loop_interrupt = Interrupt(granian)
    # SIGHUP: the terminal was closed (without nohup); Granian would reload its workers
    ignored = hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    granian.signal_handler_reload = signal.SIG_IGN if ignored else granian.signal_handler_interrupt
    if hasattr(os, "register_at_fork"):
        # SIGTERM stays pending until a worker can act on it: the inherited handler would drop it
        mask = functools.partial(signal.pthread_sigmask, signal.SIG_BLOCK, {signal.SIGTERM})
        unmask = functools.partial(signal.pthread_sigmask, signal.SIG_UNBLOCK, {signal.SIGTERM})
        os.register_at_fork(before=mask, after_in_parent=unmask)
    gc.collect()
    gc.freeze()  # a worker's collector would touch, and so copy, all the memory that it shares
    with contextlib.ExitStack() as stack:
        if server.workers > 1:  # prometheus_client looks for this once, and has been imported
            # not on a disk: where that is full, a file that is mapped kills who writes to it
            memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
            counts = tempfile.TemporaryDirectory(prefix="proxy-metrics-", dir=memory)
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = stack.enter_context(counts)
            values: Any = importlib.import_module("prometheus_client.values")
            values.ValueClass = values.get_value_class()
        load = functools.partial(load_app, config, public, os.getpid())
        try:
            granian.serve(target_loader=load, wrap_loader=False)
        except SystemExit:  # also where a worker gets the signal before its server
            if not granian.interrupt_signal:
                LOG.error("a worker has died again at once: the server ends")
                raise


def print_check(config: Config, environ: Environ, public: bool) -> int:
    """Print the lines of --check; 2 where it would not start."""
    lines = list(check_lines(config, environ, public or bool(config.server.trusted_proxies)))
    print("\n".join(f"{name:9} {text}" for name, text in lines), flush=True)
    return 2 if lines[-1][0] == "missing" else 0


def check_lines(config: Config, environ: Environ, public: bool) -> Iterator[tuple[str, str]]:
    """What is configured, what is open and what is missing."""
    server, limits, redis = config.server, config.limits, config.redis
    yield "bind", f"{server.host}:{server.port}, {'public' if public else 'this machine'}"
    for name, provider in config.providers.items():
        missing = [v for v in provider.key_vars if not (environ.get(v, "").strip() or config.demo)]
        state = f"off: {', '.join(missing)} is not set" if missing else "ready"
        yield "provider", f"{name}: {provider.adapter} at {provider.base_url}, {state}"
    for name, model in config.models.items():
        yield "model", f"{name}: {', then '.join((model.target, *model.fallback))}"
    for name, template in config.templates.items():
        yield "template", f"{name}: {template.model}"
    origins = [*server.cors_origins, *(() if public else ("this machine's",))]
    yield "origins", ", ".join(origins) or "none"
    for key, variable in ENVIRONMENT.items():
        section = key.partition(".")[0]
        if section in ("jwt", "session") and environ.get(variable) and not getattr(config, section):
            yield "unused", f"{variable}: counts only with a [{section}] block"
    tokens = {"the app's JWTs": config.jwt, "sessions": config.session}
    known = [*config.clients, *(name for name, table in tokens.items() if table)]
    yield "clients", ", ".join(known) or "no check: each address is a client"
    rates = f"{limits.requests_per_minute:g} requests and {limits.tokens_per_minute:,} tokens"
    yield "limits", f"{rates} a minute, {limits.concurrent} at a time, per client"
    caps = [
        f"{name.replace('_', ' ')} {'0.5 by address' if usd is None else usd}"
        for name, usd in asdict(config.budget).items()
        if "_per_" in name and usd != UNLIMITED
    ]
    yield "budget", f"USD: {', '.join(caps) or 'unlimited'}"
    kept = "kept over restarts" if config.ledger.persistent else "begins anew if it is lost"
    yield "ledger", f"{config.ledger.path}, {kept}" if config.ledger.path else "none"
    yield "cache", "on" if config.cache.enabled else "off"
    try:
        if redis.url:
            there = connect_redis(redis.url).connection_pool.connection_kwargs
            port = there.get("port", 6379)
            host = there.get("path") or f"{there.get('host', 'localhost')}:{port}"
            away = f"limits {redis.limits_when_away} and budgets {redis.budget_when_away}"
            yield "redis", f"{host}; while it is away, {away}"
            if wrong := asyncio.run(ping_redis(redis.url)):
                yield "warning", f"redis.url: cannot be reached now ({wrong})"
        proxy = create_app(config, environ, public=public).proxy
        check_ledger(config.ledger)
        if room := proxy.catalog.describe_room():
            yield "room", room
        for warning in proxy.warnings:
            yield "warning", warning
    except ConfigError as error:
        yield "missing", str(error)


async def ping_redis(url: str) -> str:
    """The error, or "" if it answers."""
    redis = connect_redis(url)
    try:
        await redis.ping()
    except Exception as error:  # of its own, or of what it makes of the URL
        return redact(str(error))
    finally:
        await redis.aclose()
    return ""


def check_ledger(table: LedgerTable) -> None:
    """Raises ConfigError where it cannot be written; creates no file."""
    path = Path(__file__).parent / table.path
    if table.path and path.exists():
        open_ledger(path).close()
    elif table.path and not os.access(path.parent, os.W_OK):
        raise ConfigError(f"ledger.path: {path.parent} is no folder that can be written")


async def fetch_rows(table: RedisTable, since: float, cluster: bool = False) -> list[Entry]:
    """The rows of all replicas."""
    redis, rows, start = connect_redis(table.url, cluster), list[Entry](), str(int(since * 1000))
    try:
        while page := await redis.xrange(f"{{{table.namespace}}}:rows", start, count=1000):
            rows += [msgspec.json.decode(fields[b"row"], type=Entry) for _, fields in page]
            start = f"({page[-1][0].decode()}"
    except Exception as error:
        if not cluster and type(error).__name__ == "MovedError":  # one node of a Cluster
            return await fetch_rows(table, since, cluster=True)
        fix = "without it the file of this machine is read"
        raise ConfigError(f"redis.url: cannot be read ({redact(repr(error))}); {fix}") from None
    finally:
        await redis.aclose()
    return rows


def show_usage(config: Config, options: argparse.Namespace) -> str:
    since = max(0.0, time.time() - convert(options.since, Duration, "--since"))
    path = Path(__file__).parent / config.ledger.path
    if config.redis.url:
        entries = asyncio.run(fetch_rows(config.redis, since))
        with contextlib.closing(open_ledger(None)) as database:
            # of two rows with one id the later one counts
            database.executemany(INSERT, map(astuple, entries))
            rows = read_totals(database, since, options.by)
    elif path.is_file():
        try:
            rows = read_ledger(path, since, options.by)
        except sqlite3.Error as error:
            raise ConfigError(f"ledger.path: {path} cannot be read ({error})") from None
    else:
        where = path if config.ledger.path else '"", so none is kept'
        raise ConfigError(f"ledger.path: there is no ledger at {where} (a demo keeps none)")
    if options.json:
        return msgspec.json.Encoder(decimal_format="number").encode(rows).decode()
    lines = [f"{options.by} requests errors input output USD unpriced".split()]
    lines += [[str(cell) for cell in astuple(row)] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)


if __name__ == "__main__":
    sys.exit(main())
