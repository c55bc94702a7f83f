"""`lightning-mnp scan`: from a weights file and a folder of images to a verdict and a report."""
