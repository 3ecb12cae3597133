"""Prints the lines of as many epochs as the argument says, of four steps each, with a warning after the fifteenth.

A second argument is the seconds that a step takes.
"""

import sys
import time

from ddp_circles.records.console import Console
from ddp_circles.terminal import warn
from tests.harness.tracked import row

epochs, seconds = int(sys.argv[1]), float(sys.argv[2])
console = Console(every=10, total_epochs=epochs)
for epoch in range(epochs):
    if epoch == 15:
        warn("in between")
    for step in range(4):
        console.move(epoch + step / 4)
        time.sleep(seconds)
    console.log(row(epoch))
console.close()
