"""Keypoints and the part heatmaps that are drawn from them."""
