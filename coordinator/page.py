"""The page's files, read from this package once. They are served as they lie: no build step, nothing from elsewhere."""

from importlib.resources import files

from peer.http_api import StaticFile

MEDIA_TYPES = {
    "page.html": "text/html",
    "page.css": "text/css",
    "page.js": "text/javascript",
    "chart.js": "text/javascript",
    "grid.js": "text/javascript",
    "element.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}


def page_files() -> dict[str, StaticFile]:
    """By the path they are served at; the page itself at `/`."""
    folder = files("coordinator")
    return {
        "/" if name == "page.html" else f"/{name}": StaticFile(folder.joinpath(name).read_bytes(), media_type)
        for name, media_type in MEDIA_TYPES.items()
    }
