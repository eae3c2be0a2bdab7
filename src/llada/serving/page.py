"""The page of the server: its looks and its script are `chat.html`, its colours those of the replay."""

import base64
import hashlib
import importlib.resources
import re

from llada.inference import replay


def page() -> tuple[str, str]:
    """The page, and the Content-Security-Policy that lets its one script run and nothing else."""
    template = importlib.resources.files(__package__).joinpath("chat.html").read_text(encoding="utf-8")
    html = template.replace("/*SHADES*/", _rules())
    script = re.findall(r"<script>(.*?)</script>", html, re.S)[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return html, (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _rules() -> str:
    """CSS of the shades, classes s0 (written early) to s31 (late), and of their legend."""
    shades = [f"light-dark({light}, {dark})" for light, dark in replay.shades()]
    rules = [f".s{i} {{ color: {shade} }}" for i, shade in enumerate(shades)]
    return f":root {{ --ramp: linear-gradient(to right, {', '.join(shades)}) }}\n" + "\n".join(rules)
