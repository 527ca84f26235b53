"""The fast lab: the lab's policy trained by the product's curriculum in seconds, to compare schedulers over many seeds.

Open `loop.py` first (one run), then `worlds.py` (what is trained on) and `study.py` (worlds x arms x rates x seeds).
"""
