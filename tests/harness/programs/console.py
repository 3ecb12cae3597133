"""Prints the lines of as many epochs as the argument says, with a warning after the fifteenth."""

import sys

from ddp_circles.records.console import Console
from ddp_circles.terminal import warn
from tests.harness.tracked import row

epochs = int(sys.argv[1])
console = Console(every=10, total_epochs=epochs)
for epoch in range(epochs):
    if epoch == 15:
        warn("in between")
    console.log(row(epoch))
console.close()
