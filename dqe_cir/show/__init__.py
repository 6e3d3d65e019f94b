"Figures, diagrams, tables and contact sheets."
from dqe_cir.show.diagrams import Box, flow_figure
from dqe_cir.show.figures import COLOURS, banner, data_title, interval_figure, line_figure, loss_figure
from dqe_cir.show.figures import metric_figure, metrics_table, point_figure, refresh_figure, table_title
from dqe_cir.show.figures import text_table, told
from dqe_cir.show.sheets import FRAMES, contact_sheet, evenly_spaced, framed, request_text, verdict
from dqe_cir._moved import old_name


def __getattr__(name): return old_name("show", name)
