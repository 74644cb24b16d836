"""Looking at a run: live progress in the terminal, a picture of the record. Watching never touches the run."""

from sheaf.watch.comparison import draw_comparison
from sheaf.watch.picture import compared, draw, sent_bytes
from sheaf.watch.pipeline import draw_pipeline
from sheaf.watch.progress import Progress

__all__ = ["Progress", "compared", "draw", "draw_comparison", "draw_pipeline", "sent_bytes"]
