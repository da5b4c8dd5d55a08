"""Links from the page to run folders and W&B runs."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import quote, urlsplit

from markupsafe import Markup

from largebatch.errors import UserError
from largebatch.report.load import Problem, Run
from largebatch.tracking.wandb_run import read_uploads


class Links:
    """Links to runs.

    Args:
        page: folder of the page. Links to run folders are relative, so that both can move together.
        problems: a problem is added for each run whose address in W&B can't be read.
    """

    def __init__(self, page: Path, problems: list[Problem]) -> None:
        self._page, self._problems = page, problems

    def folder(self, run: Run, text: str) -> Markup:
        """Return a link to the run's folder."""
        address = quote(os.path.relpath(run.folder.path, self._page))
        return Markup('<a href="{}/" title="{}">{}</a>').format(address, run.name, text)

    def both(self, run: Run, text: str) -> Markup:
        """Return a link to the run's folder, and one to the run in W&B if it is there."""
        url = self._wandb(run)
        shown = Markup(' (<a href="{}">W&amp;B</a>)').format(url) if url else ""
        return self.folder(run, text) + shown

    def _wandb(self, run: Run) -> str:
        """Return the address of the newest W&B run of a run folder, or an empty string."""
        try:
            urls = [entry["url"] for entry in read_uploads(run.folder.path).values() if "url" in entry]
        except (UserError, TypeError) as error:
            self._problems.append(Problem(run.name, f"{error}; its link to W&B is left out"))
            return ""
        return urls[-1] if urls and urlsplit(str(urls[-1])).scheme in ("http", "https") else ""
