"""FakeHub: stands in for huggingface_hub.HfApi and records its calls."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List, Tuple


class FakeHub:
    """Accepts the calls that a push makes, with the arguments of the real HfApi (1.0).

    Attributes:
        calls: each call's name and arguments, in order.
        files: the files of the last upload, by path in the folder.
        trouble: raised by the next upload, if it is not None.
    """

    def __init__(self) -> None:
        self.calls: List[Tuple[str, Dict[str, Any]]] = []
        self.files: Dict[str, bytes] = {}
        self.trouble: Any = None

    def whoami(self) -> Dict[str, Any]:
        return {"type": "user", "name": "me"}

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        facts = {"repo_id": repo_id, "private": private, "exist_ok": exist_ok}
        self.calls.append(("create_repo", facts))

    def create_branch(self, repo_id: str, *, branch: str, exist_ok: bool) -> None:
        facts = {"repo_id": repo_id, "branch": branch, "exist_ok": exist_ok}
        self.calls.append(("create_branch", facts))

    def upload_folder(self, *, folder_path: str, create_pr: bool, **how: Any) -> Any:
        self.calls.append(
            ("upload_folder", {"folder_path": folder_path, "create_pr": create_pr, **how})
        )
        if self.trouble is not None:
            raise self.trouble
        folder = Path(folder_path)
        self.files = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        }
        pull_request = "https://hub/pull/1" if create_pr else None
        return SimpleNamespace(commit_url="https://hub/commit/1", pr_url=pull_request)
