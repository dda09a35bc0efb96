"""Puts the recipes of launch/recipes into the wheel, where `lopt-pp recipe` finds them. All else: pyproject.toml."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

RECIPES = sorted(Path("launch", "recipes").glob("*.yaml"))


class BuildWithRecipes(build_py):
    """Builds the package, with the recipes as files of its own."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # The command finds those of the checkout.
            return
        target = Path(self.build_lib, "lopt_pp", "recipes")
        self.mkpath(str(target))
        for recipe in RECIPES:
            self.copy_file(str(recipe), str(target / recipe.name))


setup(cmdclass={"build_py": BuildWithRecipes})
