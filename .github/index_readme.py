"""Lets the links of README.md lead somewhere on the page of a package index, which has the README and nothing else.

    python .github/index_readme.py FILE

Prints the file with its links to files of the repository made absolute: to these files as they are in the release.
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent

_LINK = re.compile(r"(!?)\[([^]]*)\]\((?![a-z]+:|#)([^)\s]+)\)")


def with_absolute_links(text: str, repository: str, tag: str) -> str:
    """A page in Markdown that can be read outside of the repository.

    Args:
        text: of the page, which stands at the repository's top.
        repository: the address of the repository.
        tag: of the release.

    Returns:
        The page; images come as files, links lead to pages of the code host.
    """

    def absolute(link: re.Match[str]) -> str:
        kind = "raw" if link[1] else "blob"
        return f"{link[1]}[{link[2]}]({repository}/{kind}/{tag}/{link[3]})"

    return _LINK.sub(absolute, text)


if __name__ == "__main__":
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    page = Path(sys.argv[1]).read_text(encoding="utf-8")
    print(with_absolute_links(page, project["urls"]["Repository"], f"v{project['version']}"), end="")
