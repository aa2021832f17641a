"""Images in: folders and arrays, preprocessing, calibration and evaluation samples."""
