"""One tiny folder of each pipeline class for all tests here."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_models import tiny_hunyuan_folder, tiny_wan_folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pipeline folders by recipe name."""
    root = tmp_path_factory.mktemp("backbones")
    hunyuan, wan = tiny_hunyuan_folder(root / "hunyuan"), tiny_wan_folder(root / "wan")
    return {"hunyuan-480p": hunyuan, "hunyuan-paper": hunyuan, "wan-480p": wan}
