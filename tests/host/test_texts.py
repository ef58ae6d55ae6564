"""The translations and the help pages, as the server hands them to the frontend."""

import json
from pathlib import Path
from urllib.parse import quote

import pytest

from longcat_pack.tools.environment import PACK_NAME
from longcat_pack.tools.host import ComfyServer

LANGUAGES = ("en", "zh")


@pytest.fixture(scope="module")
def node_ids(server: ComfyServer) -> list[str]:
    """The ids of this pack's nodes."""
    modules = {name: info["python_module"] for name, info in server.object_info().items()}
    return sorted(name for name, module in modules.items() if module.endswith(PACK_NAME))


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_server_serves_the_translations(
    language: str, server: ComfyServer, pack_dir: Path, node_ids: list[str]
) -> None:
    served = json.loads(server.get("/i18n"))[language]["nodeDefs"]
    written = json.loads((pack_dir / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    assert {name: served[name] for name in node_ids} == written


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_node_has_a_help_page(language: str, server: ComfyServer, pack_dir: Path, node_ids: list[str]) -> None:
    assert {path.name for path in (pack_dir / "web" / "docs").iterdir()} == set(node_ids)
    for node_id in node_ids:
        page = server.get(f"/extensions/{quote(PACK_NAME)}/docs/{node_id}/{language}.md").decode("utf-8")
        title = json.loads(server.get("/i18n"))[language]["nodeDefs"][node_id]["display_name"]
        assert page.startswith(f"# {title}\n")
