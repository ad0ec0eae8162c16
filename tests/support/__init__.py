"""Models, files and servers that several test files share; a module each, named after what it makes."""
