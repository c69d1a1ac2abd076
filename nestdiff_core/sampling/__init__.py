"""Sampling many images: in parts, by several processes, resumed where it stopped.

parts.py deals images to processes and commits them part by part; folder.py writes sample sets for other programs.
How one batch is sampled is diffusion/cascade.py's business; the stages `samples` and `ladder` are in stages/.
"""

from nestdiff_core.sampling.folder import FORMATS, write_folder, write_npz_file
from nestdiff_core.sampling.parts import Part, in_parts, make_parts, rank, together

__all__ = ["FORMATS", "Part", "in_parts", "make_parts", "rank", "together", "write_folder", "write_npz_file"]
