"""``python -m qsr_plugin.test -opt FILE``: BasicSR's testing with this package registered."""

from __future__ import annotations

from typing import Optional

from qsr_plugin.train import run


def main(argv: Optional[list[str]] = None) -> None:
    """Test as the option file says; results go to ``results/`` in the current folder."""
    run("test", argv)


if __name__ == "__main__":
    main()
