"""Tell uv where this machine's packages come from, as lines a shell can `eval`.

uv reads neither pip's configuration files nor its `PIP_*` variables, so a machine that is set up for pip (a company
index, a folder of wheels, a certificate) is not set up for uv. This translates what pip would use into `UV_*`
variables; a variable that the user has set already wins. It also looks where the pinned CPU build of torch lies,
because the answer decides between the ways to install it:

    RATCHET_TORCH_SOURCE=folder    a configured folder of wheels holds it (pip's find-links)
    RATCHET_TORCH_SOURCE=index     a configured index holds it
    RATCHET_TORCH_SOURCE=pytorch   none does, so it comes from PyTorch's own index of CPU builds

Standard library only: it runs before anything is installed. Run it with the Python that will be used.
"""

import argparse
import base64
import configparser
import os
import platform
import re
import shlex
import ssl
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

# Seconds for one look at a remote folder or index. Long enough for a slow proxy, short enough not to stall a set-up.
LOOK_TIMEOUT_S = 10.0

WRITTEN_OPTIONS = ("index-url", "extra-index-url", "find-links", "cert", "trusted-host", "proxy")


def pip_configuration_files(environment: Mapping[str, str]) -> Iterator[Path]:
    """Yield pip's configuration files, weakest first (pip's documentation, "Configuration files")."""
    chosen = environment.get("PIP_CONFIG_FILE")
    if chosen == os.devnull:
        return
    home = Path(environment.get("HOME", "~")).expanduser()
    if sys.platform == "darwin":
        yield Path("/Library/Application Support/pip/pip.conf")
    for folder in environment.get("XDG_CONFIG_DIRS", "/etc/xdg").split(os.pathsep):
        yield Path(folder) / "pip" / "pip.conf"
    yield Path("/etc/pip.conf")
    if not (chosen and Path(chosen).exists()):
        yield home / ".pip" / "pip.conf"
        if sys.platform == "darwin":
            yield home / "Library/Application Support/pip/pip.conf"
        yield Path(environment.get("XDG_CONFIG_HOME") or home / ".config") / "pip" / "pip.conf"
    yield Path(sys.prefix) / "pip.conf"
    if chosen:
        yield Path(chosen)


def read_pip_settings(environment: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the values pip would use for `pip install`: [global], then [install], then `PIP_*` variables."""
    settings: dict[str, list[str]] = {}
    sections: dict[str, dict[str, str]] = {"global": {}, "install": {}}
    for path in pip_configuration_files(environment):
        parser = configparser.RawConfigParser()
        try:
            parser.read(path, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError) as error:
            note(f"pip's configuration file {path} cannot be read ({error}); it is left out")
            continue
        for section, values in sections.items():
            if parser.has_section(section):
                values.update({key.lower().replace("_", "-"): value for key, value in parser.items(section)})
    for values in (sections["global"], sections["install"]):
        settings.update({name: values[name].split() for name in WRITTEN_OPTIONS if values.get(name)})
    for name in WRITTEN_OPTIONS:
        value = environment.get("PIP_" + name.upper().replace("-", "_"))
        if value is not None:
            settings[name] = value.split()
    return settings


def first(values: list[str] | None) -> str | None:
    return values[0] if values else None


def note(message: str) -> None:
    print(f"      {message}", file=sys.stderr)


def without_credentials(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    if not parts.hostname:
        return url
    port = f":{parts.port}" if parts.port else ""
    return urllib.parse.urlunsplit((parts.scheme, parts.hostname + port, parts.path, "", ""))


def local_path(location: str) -> Path | None:
    """Return the folder or file that a location names, or None when it is remote."""
    if location.startswith("file:"):
        return Path(urllib.request.url2pathname(urllib.parse.urlsplit(location).path))
    if re.match(r"[a-z][a-z0-9+.-]+://", location, re.IGNORECASE):
        return None
    return Path(location).expanduser()


class Looker:
    """Looks into folders and remote pages, with the certificates and proxy that the set-up will use."""

    def __init__(self, certificates: str | None, proxy: str | None) -> None:
        handlers: list[urllib.request.BaseHandler] = []
        if certificates and Path(certificates).is_file():
            handlers.append(urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=certificates)))
        if proxy:
            handlers.append(urllib.request.ProxyHandler({"http": proxy, "https": proxy}))
        self._opener = urllib.request.build_opener(*handlers)

    def page(self, url: str) -> str | None:
        """Return the text at the URL, "" when its server answers with an error, None when nothing answers."""
        parts = urllib.parse.urlsplit(url)
        request = urllib.request.Request(without_credentials(url), headers={"Accept": "text/html"})
        if parts.username:
            login = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
            request.add_header("Authorization", "Basic " + base64.b64encode(login.encode()).decode())
        try:
            with self._opener.open(request, timeout=LOOK_TIMEOUT_S) as answer:
                return answer.read().decode("utf-8", "replace")
        except urllib.error.HTTPError:
            return ""
        except (OSError, ValueError):
            return None

    def listing(self, location: str) -> str | None:
        """Return the names of the files a flat location offers, or None when it is missing or unreachable."""
        path = local_path(location)
        if path is None:
            return self.page(location)
        if path.is_dir():
            index = path / "index.html"
            names = "\n".join(sorted(entry.name for entry in path.iterdir()))
            return names + ("\n" + index.read_text("utf-8", "replace") if index.is_file() else "")
        return path.read_text("utf-8", "replace") if path.is_file() else None


def wheel_pattern(requirement: str) -> re.Pattern[str]:
    """Return a pattern for the file name of `name==version` built for this interpreter and machine."""
    name, _, version = requirement.partition("==")
    if not version:
        raise SystemExit(f"package_sources: {requirement!r} is no pin; give name==version")
    written_version = re.escape(version).replace(r"\+", r"(?:\+|%2B)")
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    return re.compile(
        rf"\b{re.escape(name.replace('-', '_'))}-{written_version}-{tag}-{tag}-[A-Za-z0-9_.]*{platform.machine()}\.whl",
        re.IGNORECASE,
    )


def translate(environment: Mapping[str, str], requirement: str | None) -> dict[str, str]:
    """Return the variables to export, and where the required wheel comes from."""
    pip = read_pip_settings(environment)
    exports: dict[str, str] = {}

    def chosen(variable: str, value: str | None) -> str | None:
        """Keep the user's value of a variable, else export ours."""
        if variable in environment:
            return environment[variable]
        if value:
            exports[variable] = value
        return value

    certificates = first(pip.get("cert"))
    certificates = chosen("SSL_CERT_FILE", certificates if certificates and Path(certificates).is_file() else None)
    proxy = chosen("ALL_PROXY", first(pip.get("proxy")))
    looker = Looker(certificates, proxy)
    chosen("UV_INSECURE_HOST", " ".join(pip.get("trusted-host", [])))

    own_index = next((name for name in ("UV_DEFAULT_INDEX", "UV_INDEX_URL") if name in environment), None)
    main_index = environment[own_index] if own_index else chosen("UV_DEFAULT_INDEX", first(pip.get("index-url")))

    if "UV_INDEX" in environment or "UV_EXTRA_INDEX_URL" in environment:
        more_indexes = (environment.get("UV_INDEX", "") + " " + environment.get("UV_EXTRA_INDEX_URL", "")).split()
    else:
        more_indexes = []
        for url in pip.get("extra-index-url", []):
            if looker.listing(url) is None:
                note(f"pip's extra index {without_credentials(url)} is not there or does not answer; it is left out")
            else:
                more_indexes.append(url)
        if chosen("UV_INDEX", " ".join(more_indexes)):
            chosen("UV_INDEX_STRATEGY", "unsafe-best-match")  # pip's rule: all indexes together, the best match wins

    if "UV_FIND_LINKS" in environment:
        links = [link for link in environment["UV_FIND_LINKS"].split(",") if link]
        listings = {link: looker.listing(link) for link in links}
    else:
        listings = {link: looker.listing(link) for link in pip.get("find-links", [])}
        for link, listing in listings.items():
            if listing is None:
                note(f"pip's find-links {without_credentials(link)} is not there or does not answer; it is left out")
        chosen("UV_FIND_LINKS", ",".join(link for link, listing in listings.items() if listing is not None))

    if requirement:
        pattern = wheel_pattern(requirement)
        name = requirement.partition("==")[0]
        pages = [listing for listing in listings.values() if listing]
        source = "folder" if any(pattern.search(page) for page in pages) else "pytorch"
        for index in [*more_indexes, main_index or ""]:
            if index and source == "pytorch":
                location = re.sub(r"^[\w-]+=", "", index)  # uv also takes name=URL
                if pattern.search(looker.listing(f"{location.rstrip('/')}/{name}/") or ""):
                    source = "index"
        exports["RATCHET_TORCH_SOURCE"] = source
    return exports


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", metavar="NAME==VERSION", help="the pinned wheel to look for")
    arguments = parser.parse_args()
    for variable, value in translate(os.environ, arguments.wheel).items():
        print(f"export {variable}={shlex.quote(value)}")


if __name__ == "__main__":
    main()
