"""The few photographs that come with packages an analysis needs anyway."""

from __future__ import annotations

from contextlib import suppress
from importlib.resources import files
from pathlib import Path

from savl.evaluation.intervals import AnalysisUnavailable


def sample_photographs() -> list[Path]:
    """Return a temple and a flower of scikit-learn's, and a portrait of matplotlib's where it has its samples.

    Each about 0.3 megapixels, JPEG.

    Raises:
        AnalysisUnavailable: scikit-learn is not installed.
    """
    try:
        folder = Path(str(files("sklearn.datasets.images")))
    except ImportError as error:
        raise AnalysisUnavailable("an analysis", "scikit-learn", error) from error
    places = [folder / "china.jpg", folder / "flower.jpg"]
    with suppress(ImportError):
        import matplotlib

        places.append(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg")
    return [path for path in places if path.is_file()]
