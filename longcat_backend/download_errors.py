"""What a person is told when a download does not work out: what happened, what to do, and the command instead."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants, errors

from .errors import LongCatError
from .flavours import Flavour

GB = 10**9
# In a downloaded folder: repository and commit.
REVISION_FILE = ".longcat_revision"


def command(flavour: Flavour, folder: Path) -> str:
    """The command of huggingface_hub that downloads the same."""
    revision = f" --revision {flavour.revision}" if flavour.revision else ""
    return f'hf download {flavour.repo_id}{revision} --local-dir "{folder}"'


@contextmanager
def explained(flavour: Flavour, folder: Path) -> Iterator[None]:
    """Turn every failure of the network or the disk into a sentence; what stops a run on purpose passes.

    Raises:
        LongCatError: whatever of these went wrong.
    """
    try:
        yield
    except LongCatError:
        raise
    except errors.OfflineModeIsEnabled as error:
        raise _with_command(
            flavour,
            folder,
            "the environment variable HF_HUB_OFFLINE forbids it. Start ComfyUI without it",
            "环境变量 HF_HUB_OFFLINE 禁止联网。请在启动 ComfyUI 时去掉它",
        ) from error
    except errors.HfHubHTTPError as error:
        raise _refused(flavour, folder, error) from error
    except errors.HTTPError as error:
        raise _with_command(
            flavour,
            folder,
            f"the connection to {constants.ENDPOINT} failed or was cut ({type(error).__name__}: {error}). Check the "
            "network, or set HF_ENDPOINT to a mirror, and queue again: it goes on where it stopped",
            f"与 {constants.ENDPOINT} 的连接失败或中断（{type(error).__name__}: {error}）。"
            "请检查网络，或用 HF_ENDPOINT 指定镜像，然后重新运行：会从中断处继续",
        ) from error
    except OSError as error:
        raise _with_command(
            flavour,
            folder,
            f"the folder cannot be written ({error}). Check the free space and the rights of the folder and queue "
            "again: it goes on where it stopped",
            f"文件夹无法写入（{error}）。请检查其剩余空间和权限，然后重新运行：会从中断处继续",
        ) from error


def missing(flavour: Flavour, folder: Path) -> LongCatError:
    """The flavour is not there, and the person has not asked for a download."""
    size = flavour.download_gb
    return LongCatError(
        f"'{flavour.folder_name}' ({flavour.purpose_en}) is not in the model folders, and nothing is downloaded "
        f"unasked. Switch on download_missing to have it downloaded (about {size} GB) into '{folder}', or run: "
        f"{command(flavour, folder)}",
        f"模型文件夹中没有“{flavour.folder_name}”（{flavour.purpose_zh}），未经要求不会下载。"
        f"打开“下载缺少的模型”即可下载（约 {size} GB）到“{folder}”，或运行：{command(flavour, folder)}",
    )


def disk_full(flavour: Flavour, folder: Path, needed: int, free: int) -> LongCatError:
    """The disk cannot hold what is missing; both sizes in bytes."""
    has, wants = (f"{value / GB:.2f} GB" for value in (free, needed))
    return _with_command(
        flavour,
        folder,
        f"it needs {wants} more, but the disk has {has} left. Free some space, or add a folder on another disk to "
        "ComfyUI's extra_model_paths.yaml under longcat_image",
        f"还需要 {wants}，而磁盘仅剩 {has}。请腾出空间，或在 ComfyUI 的 extra_model_paths.yaml 中以 longcat_image 添加"
        "其他磁盘上的文件夹",
    )


def wrong_hash(flavour: Flavour, folder: Path, path: str) -> LongCatError:
    """A file is not the one that the hub describes."""
    return _with_command(
        flavour,
        folder,
        f"{path} arrived with another hash or size than {constants.ENDPOINT} gives, so it was removed. Queue again to "
        "receive it anew; if it happens again, a proxy or mirror in between changes files",
        f"收到的 {path} 与 {constants.ENDPOINT} 给出的哈希或大小不一致，已删除。请重新运行以再次下载；"
        "若再次出现，说明中间的代理或镜像改动了文件",
    )


def busy(flavour: Flavour, folder: Path) -> LongCatError:
    """Another process or run downloads into the same folder."""
    return LongCatError(
        f"Another download into '{folder}' is running. Wait until it has finished, then queue again.",
        f"另一个下载正在写入“{folder}”。请等它完成后重新运行。",
    )


def not_official(flavour: Flavour, absent: Sequence[str]) -> LongCatError:
    """The repository lacks parts of the official layout."""
    names = ", ".join(absent) or "-"
    return LongCatError(
        f"The repository {flavour.repo_id} of {constants.ENDPOINT} has not the official layout; missing: {names}. "
        "Look at the repository, or set HF_ENDPOINT to another mirror.",
        f"{constants.ENDPOINT} 上的仓库 {flavour.repo_id} 不是官方目录结构，缺少：{names}。"
        "请检查该仓库，或用 HF_ENDPOINT 指定其他镜像。",
    )


def _refused(flavour: Flavour, folder: Path, error: errors.HfHubHTTPError) -> LongCatError:
    status = error.response.status_code
    page = f"{constants.ENDPOINT}/{flavour.repo_id}"
    if isinstance(error, errors.GatedRepoError) or status in (401, 403):
        return _with_command(
            flavour,
            folder,
            f"{page} is not open to you (HTTP {status}). Open that page, log in and accept its terms if it asks, then "
            "run 'hf auth login' on the computer of ComfyUI and queue again",
            f"您无权访问 {page}（HTTP {status}）。请打开该页面，登录并按提示接受条款，"
            "然后在运行 ComfyUI 的电脑上执行 hf auth login，再重新运行",
        )
    if status == 404:
        wanted = f"{flavour.repo_id} @ {flavour.revision or constants.DEFAULT_REVISION}"
        note = folder / REVISION_FILE
        begun = note.is_file()
        return _with_command(
            flavour,
            folder,
            f"{constants.ENDPOINT} has no {wanted}, or not all of its files (HTTP 404). If HF_ENDPOINT names a mirror, "
            "choose another; else "
            + (f"delete '{note}' to begin with the newest version" if begun else "update this pack"),
            f"{constants.ENDPOINT} 上没有 {wanted}，或文件不全（HTTP 404）。若 HF_ENDPOINT 指定了镜像，请换一个；否则请"
            + (f"删除“{note}”，改为下载最新版本" if begun else "更新本插件"),
        )
    return _with_command(
        flavour,
        folder,
        f"{constants.ENDPOINT} answered HTTP {status}. Queue again later: it goes on where it stopped",
        f"{constants.ENDPOINT} 返回 HTTP {status}。请稍后重新运行：会从中断处继续",
    )


def _with_command(flavour: Flavour, folder: Path, en: str, zh: str) -> LongCatError:
    instead = command(flavour, folder)
    return LongCatError(
        f"'{flavour.folder_name}' could not be downloaded: {en}. Or download it yourself: {instead}",
        f"“{flavour.folder_name}”下载失败：{zh}。也可以自行下载：{instead}",
    )
