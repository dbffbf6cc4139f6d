"""One file a page. Each has `ROUTES`, and a title in `page_view.TABS`."""
