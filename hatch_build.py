"""A wheel that takes a compiled library along is for one platform; without one it is for all."""

import json
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Hook(BuildHookInterface):
    """Names the platform, and takes along what git ignores."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Look for what `sparseflash.backends.cpu.shipped.make` has made."""
        folder = "src/sparseflash/backends/cpu/prebuilt"
        about = Path(self.root, folder, "about.json")
        if version == "editable" or not about.is_file():
            return
        system = sysconfig.get_platform().rpartition("-")[0]  # linux, of linux-x86_64
        machine = json.loads(about.read_text())["machine"]
        build_data["pure_python"] = False
        platform = f"{system}_{machine}".replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"
        build_data["artifacts"] += [f"/{folder}/*"]
