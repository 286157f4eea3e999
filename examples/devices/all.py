# The four roads of this folder side by side: one training step each, from the same start.

import jit
import network
import pjit
import pmap
import shard_map

ROADS = {road.__name__: road.train for road in (jit, shard_map, pmap, pjit)}

if __name__ == "__main__":
    network.main("all.py", ROADS)
