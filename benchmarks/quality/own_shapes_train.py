"""`lopt_pp.train`, with end to end across processes by the 1F1B whose microbatches keep their own shapes."""

import sys
from unittest import mock

from benchmarks.helpers.own_shapes import OwnShapesPipeline
from lopt_pp.stage import end_to_end_stage
from lopt_pp.train import main

if __name__ == "__main__":
    with mock.patch.object(end_to_end_stage, "EndToEndPipeline", OwnShapesPipeline):
        sys.exit(main())
