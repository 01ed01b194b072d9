"""Reports as one HTML file each: offline, without libraries, from the data of `inspect` and `diff`."""
