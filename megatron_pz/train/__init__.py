"""The main loop and one update of it. Importing this package makes the platform ready, for its modules import Megatron."""

from megatron_pz.platform.select import select_platform

select_platform()
