"""The exception that the user reads."""

from longcat_pack.longcat_backend.errors import LongCatError


def test_the_text_is_english_then_chinese() -> None:
    error = LongCatError("The file is gone. Download it again.", "文件不见了。请重新下载。")
    assert str(error) == "The file is gone. Download it again.\n文件不见了。请重新下载。"
    assert (error.en, error.zh) == tuple(str(error).split("\n"))
    assert isinstance(error, ValueError)
